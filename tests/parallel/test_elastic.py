"""A run resumes with other processes, devices and meshes than those it started with."""

import shutil

import pytest
from processes import TINY, fingerprints, finish, losses, start

pytestmark = pytest.mark.slow
# processes, devices of each, mesh
LAYOUTS = {
    "1x4": (1, 4, "fsdp=-1"),
    "4x1": (4, 1, "fsdp=-1"),
    "1x4 replicas": (1, 4, "fsdp=2,replica=2"),
    "2x1 heads": (2, 1, "fsdp=1,tensor=2"),
    "2x2 sequence": (2, 2, "fsdp=2,context=2"),
    "1x1": (1, 1, "fsdp=1"),
}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(workdir, processes, devices of each, mesh) -> the output of process 0."""
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "corpus.txt").write_text("To be, or not to be, that is the question. " * 40)
    source = f"--config.data.source=text:{folder}/corpus.txt"

    def call(workdir, count, devices, mesh):
        axes = [f"--config.mesh.{axis}" for axis in mesh.split(",")]
        results = finish(
            start(
                folder,
                count,
                devices,
                "-m",
                "qkvjax",
                "train",
                *TINY,
                source,
                *axes,
                f"--workdir={workdir}",
            )
        )
        assert [result.code for result in results] == [0] * count, results[0].err[-2000:]
        return results[0].out

    return call


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """The workdir of a run of two processes with two devices each."""
    workdir = tmp_path_factory.mktemp("run") / "workdir"
    train(workdir, 2, 2, "fsdp=-1")
    return workdir


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_of_two_processes_with_two_devices_resumes_as(train, trained, tmp_path, layout):
    workdir = shutil.copytree(trained, tmp_path / "copy")
    shutil.rmtree(workdir / "checkpoints" / "20")
    output = train(workdir, *LAYOUTS[layout])
    assert "resumed after step 10 of 20, equal within rounding" in output
    resumed = losses(workdir)
    undisturbed = losses(trained)
    assert list(resumed) == list(undisturbed) == [5, 10, 15, 20]
    assert list(resumed.values()) == pytest.approx(list(undisturbed.values()), rel=1e-6)
    if LAYOUTS[layout][2] == "fsdp=-1":  # the same mesh
        assert fingerprints(workdir) == fingerprints(trained)
