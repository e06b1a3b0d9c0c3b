"""Fingerprints, damage, and what is refused."""

import json
import os
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.errors import UserError
from qkvjax.training import stacks
from qkvjax.training.checkpoint import (
    Checkpoints,
    Damaged,
    digest,
    fingerprint,
    manifest,
    named_arrays,
)

DTYPES = ["float32", "bfloat16", "float16", "int8", "uint8", "int32", "uint32", "bool"]
WIDE = ["float64", "int64"]
print_of = jax.jit(fingerprint)


def array(dtype, shape=(6, 7), seed=0):
    values = np.random.default_rng(seed).normal(0, 40, shape)
    return np.asarray(values > 0) if dtype == "bool" else values.astype(jnp.dtype(dtype))


def flipped(values, bit):
    """The array with one of its bits flipped; a bool has one bit in each byte."""
    stored = np.frombuffer(values.tobytes(), np.uint8).copy()
    byte, bit = (bit % stored.size, 0) if values.dtype == bool else divmod(bit, 8)
    stored[byte] ^= 1 << bit
    return np.frombuffer(stored.tobytes(), values.dtype).reshape(values.shape)


def prints(arrays):
    return np.asarray(jax.vmap(print_of)(jnp.stack([jnp.asarray(a) for a in arrays])))


@pytest.mark.parametrize("dtype", DTYPES + WIDE)
def test_every_flipped_bit_changes_the_fingerprint(dtype):
    with jax.enable_x64(dtype in WIDE):
        values = array(dtype, (60, 50))
        assert jnp.asarray(values).dtype == values.dtype
        bits = np.random.default_rng(1).integers(0, values.nbytes * 8, 500)
        found = prints([flipped(values, int(bit)) for bit in bits])
        original = np.asarray(print_of(values))
    assert found.shape == (500, 2) and found.dtype == np.uint32
    assert np.all(np.any(found != original, axis=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swapped_rows_change_the_fingerprint(dtype):
    values = array(dtype)
    changed = [values]
    for i in range(6):
        for j in range(i):
            swapped = values.copy()
            swapped[[i, j]] = values[[j, i]]
            changed.append(swapped)
    found = {tuple(row) for row in prints(changed)}
    assert len(found) == len(changed)  # and no two swaps agree


def test_two_flipped_signs_change_the_fingerprint():
    """The top bits of two elements: they cancel in a sum of products with odd weights."""
    values = array("float32")
    changed = [values]
    for i in range(values.size):
        other = values.copy().ravel()
        other[[i, (i + 1) % values.size]] *= -1
        changed.append(other.reshape(values.shape))
    assert len({tuple(row) for row in prints(changed)}) == len(changed)


def test_shape_and_dtype_stand_in_the_manifest():
    values = jnp.arange(12, dtype=jnp.float32)
    one, two = manifest({"w": values.reshape(3, 4)}), manifest({"w": values.reshape(4, 3)})
    assert one["w"]["shape"] == [3, 4] and one["w"]["dtype"] == "float32" and one != two
    assert len(one["w"]["fingerprint"]) == 16
    assert digest({"a": values}) != digest({"b": values}) != digest({"b": -values})


MESHES = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from qkvjax.parallel.mesh import make_mesh
from qkvjax.training.checkpoint import manifest

values = {
    "f": np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32),
    "b": np.arange(64, dtype=np.int8).reshape(8, 8),
}
for sizes in ({"fsdp": 8}, {"replica": 2, "fsdp": 4}, {"replica": 8}):
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        for spec in ((None, "fsdp"), (("replica", "fsdp"), None)):
            place = NamedSharding(mesh, PartitionSpec(*spec))
            found = manifest({name: jax.device_put(v, place) for name, v in values.items()})
            print(len(mesh.devices.ravel()), found["f"]["fingerprint"], found["b"]["fingerprint"])
"""


def test_fingerprints_do_not_depend_on_the_mesh():
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", MESHES],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["8"] * 6
    here = manifest(
        {
            "f": jnp.asarray(np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)),
            "b": jnp.arange(64, dtype=jnp.int8).reshape(8, 8),
        }
    )
    expected = [here[name]["fingerprint"] for name in ("f", "b")]
    assert all(row[1:] == expected for row in rows)


# ---- files ----------------------------------------------------------------------------------


def state(seed):
    rng = np.random.default_rng(seed)
    return {
        "model": {"w": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32), "g": jnp.ones(3)},
        "optimizer": {
            "mu": jnp.asarray(rng.normal(size=(64, 64)), jnp.bfloat16),
            "nu": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32),  # alike model.w
        },
        "step": jnp.int32(seed),
    }


def abstract(tree):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, state(step))
    checkpoints.close()
    return tmp_path / "checkpoints"


def restored(folder, step=None, tree=None):
    """(state, step, what was logged)."""
    told = []
    checkpoints = Checkpoints(folder)
    try:
        found, step = checkpoints.restore(abstract(tree or state(0)), step, log=told.append)
    finally:
        checkpoints.close()
    return found, step, told


def array_files(folder, step):
    """Files that hold array data, the largest first."""
    files = (folder / str(step) / "state").rglob("d/*")
    return sorted(files, key=lambda file: -file.stat().st_size)


def test_what_was_saved_comes_back(saved):
    for wanted, step in ((None, 2), (1, 1)):
        found, at, told = restored(saved, wanted)
        assert at == step and not told
        assert digest(found) == digest(state(step))
        assert jax.tree.map(lambda a: a.dtype, found) == jax.tree.map(
            lambda a: a.dtype, state(step)
        )
    part, _, _ = restored(saved, tree={"model": state(0)["model"]})
    assert digest(part) == digest({"model": state(2)["model"]})


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.steps() == []
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
    checkpoints.close()


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    tree, checkpoints = state(5), Checkpoints(tmp_path)
    expected = digest(tree)
    checkpoints.save(5, tree)
    tree = jax.jit(lambda t: jax.tree.map(lambda a: a * 2, t), donate_argnums=0)(tree)
    checkpoints.close()
    assert digest(restored(tmp_path)[0]) == expected != digest(tree)


def flip(file, at=None):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 8
    file.write_bytes(content)


DAMAGES = {
    "flipped bit": lambda folder: [flip(f) for f in array_files(folder, 2) if len(f.read_bytes())],
    "truncated": lambda folder: [f.write_bytes(b"") for f in array_files(folder, 2)],
    "array files gone": lambda folder: [f.unlink() for f in array_files(folder, 2)],
    "no manifest": lambda folder: (folder / "2" / "manifest" / "metadata").unlink(),
    "empty manifest": lambda folder: (folder / "2" / "manifest" / "metadata").write_bytes(b""),
    "no tree": lambda folder: (folder / "2" / "state" / "manifest.ocdbt").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_falls_back_to_the_older_one_and_says_so(saved, damage, capfd):
    DAMAGES[damage](saved)
    found, step, told = restored(saved)
    assert step == 1 and digest(found) == digest(state(1))
    (line,) = told
    assert line.startswith("checkpoint 2 is damaged and passed over: ")
    assert len(line.splitlines()) == 1
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(UserError, match="no intact checkpoint") as error:
        restored(saved, step=2)
    assert error.value.code == 45


def test_a_flip_anywhere_in_the_manifest_is_damage(saved):
    """Never taken for another model's checkpoint, and never believed."""
    file = saved / "2" / "manifest" / "metadata"
    content = file.read_bytes()
    for at in range(0, len(content), 41):
        file.write_bytes(content)
        flip(file, at)
        _, step, told = restored(saved, tree={"step": state(0)["step"]})
        assert step == 1 and "manifest" in told[0], at


def zero_a_block(file):
    content = bytearray(file.read_bytes())
    start = len(content) // 3
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    file.write_bytes(content)


DISTURBANCES = {
    "flip": flip,
    "first bit": lambda file: flip(file, 0),
    "truncate": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3]),
    "zero": zero_a_block,
    "delete": lambda file: file.unlink(),
}


def harmless_or_detected(folder, disturb, file):
    """Disturbs one file of step 2: what is restored then is what was saved, of step 2 or 1."""
    content = file.read_bytes()
    disturb(file)
    found, step, told = restored(folder)
    assert digest(found) == digest(state(step)), file
    assert step == 2 or told, file
    file.write_bytes(content)
    return step == 1


def files_of(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)


def test_a_disturbance_of_any_file_is_detected_or_harmless(saved):
    ways, detected = list(DISTURBANCES.values()), []
    for i, file in enumerate(files_of(saved / "2")):
        detected.append(harmless_or_detected(saved, ways[i % len(ways)], file))
    assert len(detected) > 8 and sum(detected) > 4


@pytest.mark.slow
@pytest.mark.parametrize("way", DISTURBANCES)
def test_every_disturbance_of_every_file_is_detected_or_harmless(saved, way):
    for file in files_of(saved / "2"):
        harmless_or_detected(saved, DISTURBANCES[way], file)


def test_a_half_deleted_step_is_passed_over(saved):
    for file in files_of(saved / "2")[::2]:
        file.unlink()
    found, step, told = restored(saved)
    assert step == 1 and told and digest(found) == digest(state(1))


def test_links_are_no_checkpoint(saved, tmp_path):
    """A checkpoint is data, and its files are its own: none leads elsewhere."""
    elsewhere = tmp_path / "elsewhere"
    (saved / "2").rename(elsewhere)
    (saved / "2").symlink_to(elsewhere)
    _, step, told = restored(saved)
    assert step == 1 and "link" in told[0]
    (saved / "2").unlink()
    shutil.copytree(elsewhere, saved / "2")
    file = array_files(saved, 2)[0]
    file.unlink()
    file.symlink_to(array_files(saved, 1)[0])
    _, step, told = restored(saved)
    assert step == 1 and "link" in told[0]


def test_a_disk_that_takes_no_more_is_told_and_leaves_the_last_one(saved, capfd):
    """By a limit of the size of files, which every system has."""
    checkpoints = Checkpoints(saved)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(UserError, match="could not be written .*File too large.*make room"):
            checkpoints.save(3, state(3))
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    checkpoints.close()
    told = capfd.readouterr().err
    assert "Traceback" not in told and "ERROR" not in told
    found, step, _ = restored(saved)
    assert step == 2 and digest(found) == digest(state(2))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_told_and_left_alone(saved):
    checkpoints = Checkpoints(saved)
    saved.chmod(0o500)
    try:
        with pytest.raises(UserError, match="could not be written .*Permission denied"):
            checkpoints.save(3, state(3))
            checkpoints.wait()
    finally:
        saved.chmod(0o700)
    checkpoints.close()
    assert restored(saved)[1] == 2


def test_verify_reads_every_array(saved):
    checkpoints = Checkpoints(saved, surroundings={"mesh": "1"})
    try:
        assert checkpoints.verify(2) == 5 and checkpoints.surroundings(2) == {}
        checkpoints.save(3, state(3))
        checkpoints.wait()
        assert checkpoints.surroundings(3) == {"mesh": "1"}
        flip(array_files(saved, 3)[0])
        with pytest.raises(Damaged):
            checkpoints.verify(3)
    finally:
        checkpoints.close()


def test_everything_damaged(saved):
    DAMAGES["flipped bit"](saved)
    for file in array_files(saved, 1):
        flip(file)
    with pytest.raises(UserError) as error:
        restored(saved)
    assert error.value.code == 45 and "delete the folder to train again" in str(error.value)


def test_a_bug_is_not_taken_for_damage(saved, monkeypatch):
    import orbax.checkpoint as ocp

    def out_of_memory(self, folder, args):
        raise MemoryError("no room")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", out_of_memory)
    with pytest.raises(MemoryError):
        restored(saved)


def test_damaged_ones_are_set_aside_for_new_ones(saved):
    DAMAGES["flipped bit"](saved)
    checkpoints, told = Checkpoints(saved), []
    _, step = checkpoints.restore(abstract(state(0)), log=told.append)
    checkpoints.set_aside(after=step, log=told.append)
    assert checkpoints.steps() == [1] and "2.damaged" in told[-1]
    checkpoints.save(2, state(7))
    checkpoints.close()
    found, step, told = restored(saved)
    assert step == 2 and not told and digest(found) == digest(state(7))
    assert (saved / "2.damaged" / "manifest").is_dir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": jnp.zeros((64, 32))}, r"has float32 \[64, 64\] for model.w .*float32 \[64, 32\]"),
        ({"w": jnp.zeros((64, 64), jnp.bfloat16)}, r"model.w where the model has bfloat16"),
        ({"u": jnp.zeros(2)}, r"has nothing for model.u where the model has float32 \[2\]"),
        ({"g": None}, r"has float32 \[3\] for model.g where the model has nothing"),
    ],
)
def test_another_model_is_no_damage(saved, change, message):
    model = {k: v for k, v in (state(0)["model"] | change).items() if v is not None}
    with pytest.raises(UserError, match=message) as error:
        restored(saved, tree={"model": model})
    assert error.value.code == 2 and "another configuration" in str(error.value)


@pytest.mark.parametrize(("step", "message"), [(3, r"no step 3; it has \[1, 2\]")])
def test_a_step_that_is_not_there(saved, tmp_path, step, message):
    with pytest.raises(UserError, match=message):
        restored(saved, step)
    with pytest.raises(UserError, match="holds no checkpoint: train first"):
        restored(tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_names_are_those_of_the_tree(saved):
    names = ["model.g", "model.w", "optimizer.mu", "optimizer.nu", "step"]
    assert sorted(named_arrays(state(0))) == names
    kept = json.loads((saved / "2" / "manifest" / "metadata").read_text())
    assert sorted(kept["arrays"]) == names


def test_small_arrays_that_are_alike_lie_in_one(saved):
    kept = json.loads((saved / "2" / "manifest" / "metadata").read_text())
    assert kept["stacks"] == {"stacks.0": ["model.w", "optimizer.nu"]}
    lying = json.loads((saved / "2" / "state" / "_METADATA").read_text())["tree_metadata"]
    assert len(lying) == 4 and any("stacks.0" in name for name in lying)
    for part in ("model", "optimizer"):
        found, _, told = restored(saved, tree={part: state(0)[part]})
        assert digest(found) == digest({part: state(2)[part]}) and not told


def test_large_arrays_lie_alone():
    small, large = jnp.zeros(2**18 - 1), jnp.zeros(2**18)  # a MiB
    found = stacks.groups({"a": small, "b": large, "c": small, "d": large})
    assert found == {"stacks.0": ["a", "c"]}
