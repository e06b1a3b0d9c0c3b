"""launch/slurm.sbatch under a real SLURM, whose controller and only node are this machine.

Needs root and Debian's packages: apt-get install slurm-wlm munge.
"""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qkvjax.files import read_lines

ROOT = Path(__file__).parents[2]
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
MISSING = [name for name in NEEDED if not shutil.which(name)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"SLURM is not installed: no {', '.join(MISSING)}"),
    pytest.mark.skipif(os.getuid() != 0, reason="starting a SLURM node needs root"),
]
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=4 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes={host} PriorityTier=10
"""
TRAIN = (
    "train",
    "--config=configs/lm.py:depth=1",
    "--config.model.d_model=16",
    "--config.model.num_heads=2",
    "--config.data.seq_len=16",
    "--config.data.batch_size=4",
    "--config.train.steps=500",
    "--config.train.log_every=10",
    "--config.train.checkpoint_every=250",
    "--config.train.eval_every=100%",
    "--config.mesh.fsdp=-1",
)


@pytest.fixture(scope="module")
def cluster():
    """cluster(*command) -> the stdout of a command of SLURM, on a cluster of this machine."""
    folder = Path("/tmp") / f"qkvjax-slurm-{os.getpid()}"  # the path of a socket must be short
    (folder / "state").mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    port = random.randrange(10_000, 20_000)
    conf = folder / "slurm.conf"
    conf.write_text(CONFIG.format(host=host, port=port, node_port=port + 1, folder=folder))
    environment = os.environ | {
        "SLURM_CONF": str(conf),
        "PYTHON": sys.executable,
        "JAX_PLATFORMS": "cpu",
        "QKVJAX_DATA_DIR": str(folder / "data"),
    }

    def call(*command):
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    daemons = [
        subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
        for log in [open(folder / "daemons.log", "a")]
        for command in (
            (
                "munged",
                "--foreground",
                "--force",
                f"--key-file={key}",
                "--num-threads=2",
                f"--socket={folder}/munge.socket",
                f"--pid-file={folder}/munge.pid",
                f"--log-file={folder}/munge.log",
                f"--seed-file={folder}/munge.seed",
            ),
            ("slurmctld", "-D", "-f", str(conf)),
            ("slurmd", "-D", "-f", str(conf), "-N", host),
        )
    ]
    try:
        until = time.monotonic() + 30
        while (
            "idle"
            not in subprocess.run(
                ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True
            ).stdout
        ):
            assert time.monotonic() < until, (folder / "daemons.log").read_text()[-3000:]
            time.sleep(0.5)
        yield call
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(60)
        shutil.rmtree(folder, ignore_errors=True)  # a step may still write its log


def submit(cluster, *flags, log):
    """Submits launch/slurm.sbatch to a cluster without GPUs; returns the number of the job."""
    given = ("--parsable", "--gpus-per-node=0", "--cpus-per-task=2", f"--output={log}")
    at = next(i for i, flag in enumerate(flags) if not flag.startswith("-"))
    return cluster("sbatch", *given, *flags[:at], "launch/slurm.sbatch", *flags[at:]).strip()


def wait(describe, condition, seconds=180):
    """Waits until condition() holds; fails with describe() after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, describe()
        time.sleep(0.2)


def state(cluster, job):
    text = cluster("scontrol", "show", "--oneliner", "job", job)
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def fingerprints(workdir):
    text = (workdir / "checkpoints" / "500" / "manifest" / "metadata").read_text()
    return json.loads(text)["arrays"]


def test_a_preempted_run_resumes_by_itself(cluster, tmp_path):
    """Two tasks: saved at the signal, requeued, and equal to an undisturbed run in the end."""
    (tmp_path / "corpus.txt").write_text("To be, or not to be, that is the question. " * 40)
    flags = ("--ntasks-per-node=2", *TRAIN, f"--config.data.source=text:{tmp_path}/corpus.txt")
    log = tmp_path / "log"
    workdir = tmp_path / "preempted"
    job = submit(cluster, *flags, f"--workdir={workdir}", log=log)

    def output():
        return log.read_text()[-3000:] if log.exists() else state(cluster, job)

    wait(output, lambda: read_lines(workdir / "metrics.jsonl"))
    cluster("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    wait(output, lambda: "ended with 42" in log.read_text())
    wait(output, lambda: state(cluster, job)["JobState"] == "PENDING")
    cluster("scontrol", "update", f"jobid={job}", "StartTime=now")  # SLURM waits two minutes
    wait(output, lambda: state(cluster, job)["JobState"] == "COMPLETED")
    text = log.read_text()
    assert text.count("stopped: saved after step") == 1 and text.count("resumed after step") == 1
    assert state(cluster, job)["Restarts"] == "1" and text.rstrip().endswith("ended with 0")

    other = submit(cluster, *flags, f"--workdir={tmp_path}/undisturbed", log=tmp_path / "log2")
    wait(output, lambda: state(cluster, other)["JobState"] == "COMPLETED")
    assert fingerprints(workdir) == fingerprints(tmp_path / "undisturbed")
    steps = [line["step"] for line in read_lines(workdir / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 500


def test_bad_input_is_not_requeued(cluster, tmp_path):
    log = tmp_path / "log"
    job = submit(cluster, "--ntasks-per-node=1", "train", "--config=configs/none.py", log=log)
    wait(lambda: state(cluster, job), lambda: state(cluster, job)["JobState"] == "FAILED")
    assert state(cluster, job)["ExitCode"] == "2:0" and "there is no recipe" in log.read_text()


def test_the_points_of_a_study_are_an_array(cluster, tmp_path):
    (tmp_path / "corpus.txt").write_text("To be, or not to be, that is the question. " * 40)
    log, workdir = tmp_path / "log", tmp_path / "study"
    flags = (
        "study",
        "--config=configs/quickstart.py",
        f"--workdir={workdir}",
        f"--config.data.source=text:{tmp_path}/corpus.txt",
        "--config.train.steps=5",
        "--config.data.seq_len=16",
        "--config.data.batch_size=4",
        "--config.model.d_model=16",
        "--config.model.num_heads=2",
        "--config.model.num_layers=1",
    )
    job = submit(cluster, "--array=0-1", "--ntasks-per-node=1", *flags, log=log)
    wait(log.read_text, lambda: len(read_lines(workdir / "results.jsonl")) == 2)
    done = read_lines(workdir / "results.jsonl")
    assert sorted(line["label"] for line in done) == ["Q-K=V", "QKV"]
    assert {line["status"] for line in done} == {"done"}
    wait(lambda: job, lambda: log.read_text().count("ended with 0") == 2)
