"""One run over several processes: the same numbers, one writer, one end."""

import fcntl
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from processes import (
    ROOT,
    TINY,
    environment,
    fingerprints,
    finish,
    free_port,
    losses,
    once_it_trains,
    start,
)

from qkvjax.files import read_lines

FLAGS = ("-m", "qkvjax", "train", *TINY)
PORT = free_port()


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(workdir, *flags) -> a `Result` of each of `count` processes over two devices."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "corpus.txt").write_text("To be, or not to be, that is the question. " * 40)
    source = f"--config.data.source=text:{folder}/corpus.txt"

    def call(workdir, *flags, count=2, then=None, **more):
        args = (*FLAGS, source, f"--workdir={workdir}", *flags)
        started = start(folder, count, 2 // min(count, 2), *args, **more)
        if then is not None:
            then(started)
        return finish(started)

    return call


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """(the results of a run of two processes, its workdir)."""
    workdir = tmp_path_factory.mktemp("run") / "workdir"
    return train(workdir), workdir


def codes(results):
    return [result.code for result in results]


def test_process_0_alone_writes_and_prints(trained):
    results, workdir = trained
    assert codes(results) == [0, 0], results[0].err[-2000:]
    assert "step 20/20" in results[0].out
    assert "mesh 1x2x1x1x1" in results[0].out
    assert not re.sub(r"\[Gloo\].*\n", "", results[1].out)  # lines of gloo itself
    steps = [line["step"] for line in read_lines(workdir / "metrics.jsonl")]
    assert steps == [5, 10, 15, 20]
    assert json.loads((workdir / "run.json").read_text())["environment"]["num_processes"] == 2


def test_one_process_resumes_a_run_of_two(train, trained, tmp_path):
    """On the same mesh, and so to the last bit."""
    workdir = shutil.copytree(trained[1], tmp_path / "copy")
    shutil.rmtree(workdir / "checkpoints" / "20")
    results = train(workdir, count=1)
    assert codes(results) == [0]
    # The message promises less than what holds here.
    assert "resumed after step 10 of 20, equal within rounding" in results[0].out
    assert "processes was 2, is 1" in results[0].out
    assert fingerprints(workdir) == fingerprints(trained[1])
    assert losses(workdir) == losses(trained[1])


def test_another_mesh_resumes_within_rounding(train, trained, tmp_path):
    """One device instead of two, from the middle."""
    workdir = shutil.copytree(trained[1], tmp_path / "copy")
    shutil.rmtree(workdir / "checkpoints" / "20")
    results = train(workdir, "--config.mesh.fsdp=1", count=1)
    assert codes(results) == [0], results
    assert "mesh was '1x2x1x1x1', is '1x1x1x1x1'" in results[0].out
    resumed = losses(workdir)
    undisturbed = losses(trained[1])
    assert resumed.keys() == undisturbed.keys()
    for step in (15, 20):
        assert resumed[step] == pytest.approx(undisturbed[step], rel=1e-6)


def coordinator(process):
    """The port at which a process meets the others."""
    flag = next(arg for arg in process.args if arg.startswith("--coordinator="))
    return int(flag.rpartition(":")[2])


def listening(port):
    """Addresses, as the kernel writes them, at which something listens on a port."""
    addresses = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            address, number = fields[1].split(":")
            is_listening = fields[3] == "0A"
            if int(number, 16) == port and is_listening:
                addresses.add(address)
    return addresses


def test_a_signal_to_one_process_saves_and_stops_all_after_the_same_step(train, tmp_path):
    workdir = tmp_path / "workdir"
    long = (
        "--config.train.steps=1000000",
        "--config.optimizer.schedule=constant",
        "--config.train.log_every=1",
    )

    def act(started):
        addresses = listening(coordinator(started[0]))
        assert addresses
        assert all(address.endswith("0100007F") for address in addresses)  # 127.0.0.1
        started[1].send_signal(signal.SIGUSR1)
        while not (workdir / "checkpoints").is_dir():
            time.sleep(0.05)
        started[1].send_signal(signal.SIGTERM)

    results = train(workdir, *long, then=once_it_trains(workdir, act))
    assert codes(results) == [42, 42], results
    assert "stopped: saved after step" in results[0].err
    assert "stopped" not in results[1].err
    last = read_lines(workdir / "metrics.jsonl")[-1]["step"]
    saved = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert len(saved) == 2 and saved[1] == last


def test_processes_of_different_configurations_are_refused(train, tmp_path):
    results = train(tmp_path / "workdir", last_flags=["--config.seed=5"])
    assert codes(results) == [2, 2]
    assert "process 1: the processes of a job run one program" in results[0].err
    assert "seed: 5, process 0 has 0" in results[0].err
    assert results[1].err == ""
    assert not (tmp_path / "workdir").exists()


def test_processes_with_different_attention_flags_are_refused(train, tmp_path):
    results = train(tmp_path / "workdir", last_flags=["--attention=reference"])
    assert codes(results) == [2, 2]
    assert "attention: 'reference', process 0 has 'auto'" in results[0].err
    assert results[1].err == ""
    assert not (tmp_path / "workdir").exists()


def test_a_kernel_that_fails_on_one_process_is_used_by_none(tmp_path):
    """Two processes, each with a pretended GPU; on the second one the trial of the kernel fails."""
    results = finish(start(tmp_path, 2, 1, "-c", AGREE))
    assert codes(results) == [0, 0], results[0].err[-2000:] + results[1].err[-2000:]
    assert "chosen: ('triton', 'xla') then xla" in results[0].out
    assert "chosen: ('triton', 'xla') then xla" in results[1].out
    assert "not triton: process 1: it does not run here" in results[0].err
    assert "attention:" not in results[1].err  # only process 0 prints


AGREE = """
import dataclasses, sys
from absl import flags
from qkvjax.commands import cli
from qkvjax.kernels import choice
from qkvjax.kernels.trial import Problem
from qkvjax.parallel import distributed, job
from qkvjax.parallel.target import Target

def failure(kernel, problem):
    failed = problem.window == 5 and distributed._index == 1
    return "it does not run here" if failed else None

choice.trial.failure = failure
choice.target = lambda: Target("gpu", "NVIDIA A10", "8.6", here=True)
problem = Problem("bfloat16", 64, 64, 1, 32, packed=True)
other = dataclasses.replace(problem, window=5)
unknown = dataclasses.replace(problem, width=80, value_width=80, packed=False)

def trace():
    for each in (problem, other, problem):
        choice.choose("auto", each)

values = flags.FlagValues()
cli.define(values, job.FLAGS)
values(sys.argv)
with job.join(values):
    names = choice.settle(trace)
    choice._agreed.discard("triton")  # nothing was agreed on what comes later
    print("chosen:", names, "then", choice.choose("auto", unknown))
"""


def test_a_process_that_never_comes(train, tmp_path):
    results = train(tmp_path / "workdir", "--init_seconds=3", job_size=3)
    assert codes(results) == [2, 2]
    for i, result in enumerate(results):
        err = result.err
        assert f"process {i} of 3 did not meet the others at 127.0.0.1:" in err
        assert "within 3 s: start all of them" in err and "Traceback" not in err


def test_an_error_of_process_0_ends_all(train, trained):
    with open(trained[1] / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = train(trained[1])
    assert codes(results) == [2, 2], results
    assert "another process is at work" in results[0].err


@pytest.mark.slow
def test_open_mpi_announces_the_others(trained, tmp_path):
    """With the variables of its mpirun; the run equals that of processes with flags."""
    workdir, folder = tmp_path / "workdir", trained[1].parents[1] / "processes0"
    corpus = json.loads((trained[1] / "config.json").read_text())["data"]["source"]
    started = []
    for i in range(2):
        mpi = {
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": str(i),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
            "JAX_COORDINATOR_PORT": str(PORT),
        }
        started.append(
            subprocess.Popen(
                [sys.executable, *FLAGS, f"--config.data.source={corpus}", f"--workdir={workdir}"],
                env=environment(folder, 1, **mpi),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    results = finish(started)
    assert codes(results) == [0, 0], results[0].err[-2000:]
    assert fingerprints(workdir) == fingerprints(trained[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "--coordinator and --process_id missing: nothing here announces"),
        (["--coordinator=here:1", "--num_processes=2", "--process_id=2"], "must be from 0 to 1"),
        (["--coordinator=here", "--num_processes=2", "--process_id=0"], "has no port"),
        (
            ["--coordinator=192.0.2.1:2345", "--num_processes=2", "--process_id=0"],
            "Cannot assign requested address",
        ),
        (["--coordinator=127.0.0.1:99999", "--num_processes=2", "--process_id=0"], "0-65535"),
        (["--num_processes=1", "--config.mesh.fsdp=3"], "needs a multiple of 3 devices"),
    ],
)
def test_flags_that_do_not_fit(tmp_path, flags, message):
    done = subprocess.run(
        [
            sys.executable,
            *FLAGS,
            f"--workdir={tmp_path}/w",
            "--config.data.source=text:README.md",
            *flags,
        ],
        capture_output=True,
        text=True,
        env=environment(tmp_path, 2),
        cwd=ROOT,
    )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_checkpoint_that_one_process_cannot_read_is_skipped_by_all(
    train, trained, tmp_path, process
):
    workdir = shutil.copytree(trained[1], tmp_path / "copy")
    folder = workdir / "checkpoints" / "20" / "state" / f"ocdbt.process_{process}" / "d"
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    results = train(workdir)
    assert codes(results) == [0, 0], results
    assert "checkpoint 20 is damaged and passed over" in results[0].out
    assert fingerprints(workdir) == fingerprints(trained[1])


def certificates(folder):
    """The environment variables of a process that uses mutual TLS, and their files."""

    def openssl(*args):
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "rsa:2048", "-nodes", "-days", "2")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca")
    openssl("req", *key, "-keyout", "own.key", "-out", "own.csr", "-subj", "/CN=own")
    (folder / "names").write_text("subjectAltName=URI:spiffe://qkvjax/own")
    openssl(
        "x509",
        "-req",
        "-in",
        "own.csr",
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca.key",
        "-days",
        "2",
        "-CAcreateserial",
        "-out",
        "own.pem",
        "-extfile",
        "names",
    )
    return {
        "JAX_MTLS_CERT_FILE": f"{folder}/own.pem",
        "JAX_MTLS_KEY_FILE": f"{folder}/own.key",
        "JAX_MTLS_CA_FILE": f"{folder}/ca.pem",
        "JAX_MTLS_PEER_URI_PREFIX": "spiffe://qkvjax/",
    }


has_tls = hasattr(jax.config, "jax_mtls_cert_file")


@pytest.mark.skipif(has_tls, reason="this jax supports mutual TLS")
def test_certificates_are_refused_where_jax_would_ignore_them(train, tmp_path):
    results = train(tmp_path / "workdir", JAX_MTLS_CERT_FILE="own.pem")
    assert codes(results) == [2, 2], results
    assert "does not support mutual TLS" in results[0].err


@pytest.mark.slow
@pytest.mark.skipif(not has_tls, reason="mutual TLS needs jax 0.12")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_processes_meet_by_mutual_tls(train, trained, tmp_path):
    results = train(tmp_path / "workdir", **certificates(tmp_path))
    assert codes(results) == [0, 0], results
    assert fingerprints(tmp_path / "workdir") == fingerprints(trained[1])
