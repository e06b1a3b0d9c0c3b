"""Checks launch files that cannot run here, with the tools and schemas of their formats."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}


def strict(**properties):
    """A JSON schema of an object that has no other keys than these."""
    return {"type": "object", "properties": properties, "additionalProperties": False}


# The fields of jobset.x-k8s.io/v1alpha2 that the file uses, with the names of its Go types.
JOBSET = strict(
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=strict(name=NAME),
    spec=strict(
        network=strict(
            enableDNSHostnames={"type": "boolean"}, publishNotReadyAddresses={"type": "boolean"}
        ),
        failurePolicy=strict(
            maxRestarts={"type": "integer", "minimum": 0},
            rules={
                "type": "array",
                "items": strict(
                    name=NAME,
                    action={
                        "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                    },
                    onJobFailureReasons={
                        "type": "array",
                        "items": {
                            "enum": [
                                "BackoffLimitExceeded",
                                "DeadlineExceeded",
                                "FailedIndexes",
                                "MaxFailedIndexesExceeded",
                                "PodFailurePolicy",
                            ]
                        },
                    },
                ),
            },
        ),
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": strict(
                name=NAME, replicas={"type": "integer", "minimum": 1}, template={"type": "object"}
            ),
        },
    ),
)


def tool(name):
    """The path of a program that the test extra installs beside this Python."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or name


def run(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_is_clean(script):
    done = run(tool("shellcheck"), "-x", str(script.relative_to(ROOT)))
    assert done.returncode == 0, done.stdout


def test_hadolint_is_clean():
    done = run(tool("hadolint"), "launch/Dockerfile")
    assert done.returncode == 0, done.stdout


def test_what_the_image_copies_is_here():
    for line in re.findall(r"^COPY (.*)", (LAUNCH / "Dockerfile").read_text(), re.M):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists(), name


def documents():
    return list(yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text()))


def check_kubernetes(jobset, policy):
    jsonschema.validate(jobset, JOBSET)
    for job in jobset["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
        kubernetes_validate.validate(whole | job["template"], "1.33", strict=True)
    kubernetes_validate.validate(policy, "1.33", strict=True)


def test_jobset():
    jobset, policy = documents()
    check_kubernetes(jobset, policy)
    [job] = jobset["spec"]["replicatedJobs"]
    spec, name = job["template"]["spec"], jobset["metadata"]["name"]
    [container] = spec["template"]["spec"]["containers"]
    flags = dict(arg[2:].split("=", 1) for arg in container["args"] if arg.startswith("--"))
    assert spec["parallelism"] == spec["completions"] == int(flags["num_processes"])
    assert flags["coordinator"].startswith(f"{name}-{job['name']}-0-0.{name}:")
    codes = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule["onExitCodes"]["values"]
    }
    assert codes == {42: "Ignore", 2: "FailJob", 44: "FailJob", 45: "FailJob"}


@pytest.mark.parametrize(
    ("where", "wrong", "right"),
    [
        (("spec", "failurePolicy"), "maxRestart", "maxRestarts"),
        (("spec", "replicatedJobs", 0, "template", "spec"), "paralelism", "parallelism"),
        (("spec", "replicatedJobs", 0), "replica", "replicas"),
    ],
)
def test_a_misspelt_field_is_reported(where, wrong, right):
    jobset, policy = documents()
    part = jobset
    for key in where:
        part = part[key]
    part[wrong] = part.pop(right)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_kubernetes(jobset, policy)


def test_skypilot_reads_its_file():
    """With its own parser where SkyPilot is installed; the flags are checked everywhere."""
    text = (LAUNCH / "skypilot.yaml").read_text()
    task = yaml.safe_load(text)
    assert task["num_nodes"] == 2 and "--process_id" in task["run"]
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed: pip install skypilot")
    sky.Task.from_yaml_config(task)


def test_every_file_gives_the_same_duration_of_the_quickstart():
    """Whoever measures another duration must change all of them."""
    number = {"four": "4", "five": "5", "six": "6", "seven": "7", "ten": "10"}
    files = [ROOT / "README.md", LAUNCH / "quickstart.sh", ROOT / "configs" / "quickstart.py"]
    pattern = r"(\w+)\s+minutes\s+on\s+(?:two|2)\s+CPU\s+cores"
    files_by_minutes = {}
    for file in files:
        for word in re.findall(pattern, file.read_text()):
            minutes = number.get(word.lower(), word)
            files_by_minutes.setdefault(minutes, []).append(file.name)
    assert len(files_by_minutes) == 1, files_by_minutes
    assert len(next(iter(files_by_minutes.values()))) == len(files), files_by_minutes


def test_tpu_vm_dry_run():
    done = run("bash", "launch/tpu_vm.sh", "--dry_run", "slice", "zone", "--config=a b", "--x=1")
    assert done.returncode == 0, done.stderr
    copy, *rest = done.stdout.splitlines()
    assert re.fullmatch(
        r"gcloud compute tpus tpu-vm scp \S+ slice:qkvjax.tar.gz --zone=zone --worker=all", copy
    )
    assert rest[0].startswith("gcloud compute tpus tpu-vm ssh slice --zone=zone --worker=all")
    assert rest[-1] == r".venv/bin/python -m qkvjax train --config=a\ b --x=1"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("launch/tpu_vm.sh", "--dry_run", "slice"), "NAME ZONE --config"),
        (("launch/tpu_vm.sh", "--config=x", "zone", "y"), "NAME ZONE --config"),
        (("launch/local.sh",), "must be the number of processes"),
        (("launch/local.sh", "two"), "must be the number of processes"),
        (("launch/slurm.sbatch", "train"), "submit this file"),
    ],
)
def test_usage(command, message):
    done = run("bash", *command)
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.parametrize(
    ("variables", "code", "message"),
    [
        ("SLURM_ARRAY_TASK_ID=3 SLURM_NTASKS=1 SLURM_GPUS_ON_NODE=1", 0, "--jobs=2 --point=3"),
        ("SLURM_ARRAY_TASK_ID=3 SLURM_NTASKS=1", 0, "--point=3"),
        ("SLURM_ARRAY_TASK_ID=3 SLURM_NTASKS=1 SLURM_GPUS_ON_NODE=8", 2, "--gpus-per-node=1"),
        ("SLURM_ARRAY_TASK_ID=3 SLURM_NTASKS=8 SLURM_GPUS_ON_NODE=8", 2, "--ntasks-per-node=1"),
        ("SLURM_ARRAY_TASK_ID=3 SLURM_NTASKS_PER_NODE=8", 2, "this job has 8"),
        ("SLURM_NTASKS=1 SLURM_GPUS_ON_NODE=8", 0, "qkvjax study --jobs=2"),
    ],
)
def test_a_point_of_an_array_uses_one_device(tmp_path, variables, code, message):
    """Runs the script of a job with an srun that only prints the command."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    slurm = dict(word.split("=") for word in variables.split())
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(ROOT)} | slurm
    command = ("bash", "launch/slurm.sbatch", "study", "--jobs=2")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr
    assert message in done.stdout + done.stderr
    assert ("qkvjax study" in done.stdout) == (code == 0)


def test_the_array_of_the_example_asks_for_one_device():
    text = (LAUNCH / "slurm.sbatch").read_text()
    examples = [line for line in text.splitlines() if "sbatch --array=" in line and "#" in line]
    assert examples and all("--gpus-per-node=1 " in line for line in examples)


def test_each_file_says_where_it_ran():
    for file in LAUNCH.iterdir():
        if file.name in ("environment.sh", "test.sh", "quickstart.sh"):
            continue  # tests or people run these as they are, on any machine
        text = file.read_text()
        head = text[:2000]
        assert re.search(r"^# (Ran|Built): ", head, re.M), file
        for name in re.findall(r"tests/\S+\.py", text):
            assert (ROOT / name).is_file(), f"{file} names {name}"
