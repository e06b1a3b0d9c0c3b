"""Checkpoints: the only importer of Orbax, plus fingerprints of every array.

A checkpoint is `checkpoints/STEP/` with the arrays of the train state under the names of
their tree paths, small ones in stacks, and a manifest with each array's shape, dtype and
fingerprint. Orbax does not notice flipped bits in array data; the fingerprints, checked on
restore, do.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from qkvjax.errors import UserError
from qkvjax.parallel.distributed import first, together
from qkvjax.parallel.replicas import differing_copies
from qkvjax.training import quiet, stacks
from qkvjax.training.guard import Rollback
from qkvjax.training.kept import Kept

NO_INTACT_CHECKPOINT = 45
_MANIFEST = "manifest"
_STATE = "state"


def _mix(h: jax.Array, seed: int) -> jax.Array:
    """A 32-bit finalizer in the manner of MurmurHash3."""
    h = (h ^ jnp.uint32(seed)) * jnp.uint32(0x9E3779B1)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    return h ^ (h >> 13)


def fingerprint(x: jax.Array) -> jax.Array:
    """64 bits of an array, uint32 [2], whatever its sharding.

    The sum modulo 2^32 of a hash of each element's bits and index: integer sums commute, so
    mesh, processes and reduction order do not matter, and the hash is one to one in the bits, so
    every change of a single element changes the value. Elements of 8 bytes count as two.
    """
    size = x.dtype.itemsize
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        lane = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[size]
        bits = jax.lax.bitcast_convert_type(x, lane).astype(jnp.uint32)
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        step = jnp.uint32(stride % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * step
        stride *= bits.shape[axis]
    # A product of bits and weights would not do: it does not see two flipped signs.
    sums = [jnp.sum(_mix(bits ^ _mix(index, s), s), dtype=jnp.uint32) for s in (1, 0xDEADBEEF)]
    return jnp.stack(sums)


_fingerprints = jax.jit(lambda arrays: jnp.stack([fingerprint(array) for array in arrays]))


def named_arrays(tree) -> dict[str, jax.Array]:
    """The leaves of a tree under stable names such as "model.stack.blocks.0.mlp.up.weight"."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        named[name.removesuffix(".value").replace(".value.", ".")] = leaf
    return named


def manifest(arrays: dict[str, jax.Array]) -> dict[str, dict]:
    """Shape, dtype and fingerprint (16 hex digits) of each array."""
    # One array comes from the device: fetching one for each takes as long as half a step.
    prints = jax.device_get(_fingerprints(list(arrays.values())))
    return {
        name: {
            "shape": list(array.shape),
            "dtype": str(array.dtype),
            "fingerprint": "{:08x}{:08x}".format(*words),
        }
        for (name, array), words in zip(arrays.items(), prints.tolist(), strict=True)
    }


class Checkpoints:
    """The checkpoints of a workdir, saved in the background.

    Args:
      folder: `workdir/checkpoints`; made when something is saved.
      keep: how many of the newest stay.
      surroundings: what a state's last bits depend on beside itself, saved with it.
      keep_every: steps whose multiples stay as well; 0: none.

    Attributes:
      kept: which checkpoints stay; the step of the best one may be set there.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        surroundings: Mapping | None = None,
        keep_every: int = 0,
    ):
        self.folder = Path(folder).absolute()
        self.kept = Kept(keep, keep_every)
        self._surroundings = dict(surroundings or {})
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=self.kept, enable_async_checkpointing=True, create=False
        )
        self._open_manager = None

    @property
    def _manager(self) -> ocp.CheckpointManager:
        if self._open_manager is None:
            quiet.saving()
            try:
                with self._writing():
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self._open_manager = ocp.CheckpointManager(self.folder, options=self._options)
            except ValueError as error:
                raise UserError(
                    f"the metadata of the checkpoints in {self.folder} is damaged ({error}):"
                    " restore it from a copy, or delete the folder to train again",
                    code=NO_INTACT_CHECKPOINT,
                ) from None
        return self._open_manager

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in order."""
        if not first(self.folder.exists):
            return []
        if not self.folder.is_dir():
            raise UserError(
                f"{self.folder} is not a folder: remove it, or choose another --workdir"
            )
        manager = self._manager
        return first(lambda: sorted(manager.all_steps()))

    def choose(self, step: int | None) -> list[int]:
        """[step], or all steps for None.

        Raises:
          UserError: there is no such step, or none at all.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise UserError(f"{self.folder} has no step {step}; it has {steps or 'none'}")
        if not steps:
            raise UserError(f"{self.folder} holds no checkpoint: train first")
        return steps if step is None else [step]

    def prepare(self, state) -> None:
        """Compiles what the first save would be held up by."""
        arrays = named_arrays(state)
        manifest(arrays)
        stacks.joined(arrays, stacks.groups(arrays))
        check_copies(state)

    def save(self, step: int, state) -> None:
        """Starts saving; the state may be donated as soon as this returns."""
        arrays = named_arrays(state)
        groups = stacks.groups(arrays)
        told = {"arrays": manifest(arrays), "surroundings": self._surroundings, "stacks": groups}
        items = ocp.args.Composite(
            **{
                _STATE: ocp.args.PyTreeSave(stacks.joined(arrays, groups)),
                _MANIFEST: ocp.args.JsonSave(_signed(told)),
            }
        )
        with self._writing():
            self._manager.save(step, args=items)

    def restore(self, abstract, step: int | None = None, *, log=print):
        """The newest intact state, or the one of `step`, placed as `abstract` says.

        Args:
          abstract: a tree of ShapeDtypeStructs with shardings, of the state's structure. A
            part of the state will do (the model alone, say) when its names are those of the
            saved tree.
          step: None means the newest that is intact.
          log: gets a line for each checkpoint that is passed over.

        Returns:
          (state, step).

        Raises:
          UserError: there is no such step (code 2), or none is intact (code 45).
        """
        steps = self.choose(step)
        for candidate in reversed(steps):
            try:
                return self._restore(abstract, candidate), candidate
            except UserError as damage:  # of another process, perhaps
                if damage.code != NO_INTACT_CHECKPOINT:
                    raise
                log(f"checkpoint {candidate} is damaged and passed over: {damage}")
        raise UserError(
            f"no intact checkpoint in {self.folder} (tried {steps}): restore it from a"
            " copy, or delete the folder to train again",
            code=NO_INTACT_CHECKPOINT,
        )

    def _restore(self, abstract, step: int):
        wanted = named_arrays(abstract)
        manifested = together(lambda: self._read_manifest(step))
        saved, groups = manifested["arrays"], manifested.get("stacks", {})  # older ones have none
        _check_names(wanted, saved, self.folder)
        read = together(lambda: self._read_arrays(step, stacks.abstract(wanted, groups)))
        arrays = stacks.parted(read, groups, wanted)
        found = manifest(arrays)
        if differing := [name for name in wanted if found[name] != saved[name]]:
            raise Damaged(f"the fingerprint of {', '.join(differing)} differs")
        return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])

    def _read_manifest(self, step: int) -> dict[str, dict]:
        folder = Path(self._manager.directory) / str(step)
        if any(path.is_symlink() for path in (folder, *folder.rglob("*"))):
            raise Damaged("it has links, which may lead anywhere")
        try:
            saved = ocp.JsonCheckpointHandler().restore(self._item(step, _MANIFEST))
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            if getattr(error, "errno", None) in _PASSING:
                raise
            raise Damaged(f"its manifest cannot be read ({type(error).__name__})") from error
        if not isinstance(saved, dict) or saved != _signed(saved):
            raise Damaged("its manifest is not what was saved")
        return saved

    def surroundings(self, step: int) -> dict:
        """What an intact checkpoint was saved in."""
        return together(lambda: self._read_manifest(step))["surroundings"]

    def verify(self, step: int) -> int:
        """The number of arrays of a checkpoint, each of which was read and is what was saved.

        Raises:
          Damaged: one is not.
        """
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        saved = self._read_manifest(step)["arrays"]
        abstract = {
            name: jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"], sharding=place)
            for name, entry in saved.items()
        }
        self._restore(abstract, step)
        return len(saved)

    def _read_arrays(self, step: int, wanted: dict) -> dict[str, jax.Array]:
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        item = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
        with _damage():
            return ocp.PyTreeCheckpointHandler().restore(self._item(step, _STATE), args=item)

    def _item(self, step: int, name: str):
        # Read without the manager, in which a process that can read all it needs waits for one that
        # cannot.
        return self._manager.directory / str(step) / name

    def set_aside(self, after: int, *, log=print) -> None:
        """Renames the checkpoints of later steps, which were passed over, to STEP.damaged.

        Orbax saves no step up to the newest that is there, so they would be in the way.
        """
        if not (later := [step for step in self.steps() if step > after]):
            return
        self.close()

        def rename():
            for step in later:
                damaged = self.folder / f"{step}.damaged"
                shutil.rmtree(damaged, ignore_errors=True)
                (self.folder / str(step)).rename(damaged)
                log(f"checkpoint {step} is now {damaged}")

        first(rename)

    def wait(self) -> None:
        """Until what is being saved is on disk."""
        if self._open_manager is not None:
            with self._writing():
                self._open_manager.wait_until_finished()

    def close(self) -> None:
        """Waits and frees the background threads."""
        manager, self._open_manager = self._open_manager, None
        if manager is not None:
            with self._writing():
                manager.close()

    @contextlib.contextmanager
    def _writing(self):
        """Turns what Orbax raises on a disk that takes no more into UserError."""
        try:
            yield
        except (OSError, ValueError) as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if code is None and not isinstance(error, OSError):
                raise
            reason = os.strerror(int(code[1])) if code else error.strerror or str(error)
            raise UserError(
                f"a checkpoint could not be written to {self.folder} ({reason}): make room or"
                " repair it, then run the same command: it goes on from the newest checkpoint"
            ) from None


# Trouble of the machine, not of a file: condemning intact checkpoints for it would cost a run.
_PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.ETIMEDOUT}


class Damaged(UserError):
    """A checkpoint that cannot be read or whose arrays are not what was saved."""

    def __init__(self, message: str):
        super().__init__(message, NO_INTACT_CHECKPOINT)


@contextlib.contextmanager
def _damage():
    """Turns what Orbax raises on unreadable arrays into Damaged, and keeps it quiet.

    Arrays are read at the same time; those that fail after the first write pages to stderr, by
    way of Python's hooks, its warnings and the log.
    """
    hooks, log, damage = (sys.unraisablehook, sys.excepthook), logging.getLogger("asyncio"), None
    sys.unraisablehook = sys.excepthook = lambda *told: None
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        try:
            yield
        except Exception as error:
            # Orbax raises the bare Exception for array data.
            known = (ValueError, OSError, KeyError, TypeError, AttributeError)
            if not isinstance(error, known) and type(error) is not Exception:
                raise
            if getattr(error, "errno", None) in _PASSING:
                raise
            damage = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if damage:
            time.sleep(0.5)  # for the reads that are still under way
            with warnings.catch_warnings(action="ignore"):
                gc.collect()
            raise Damaged(damage)
    finally:
        sys.unraisablehook, sys.excepthook = hooks
        if not damage:  # else reads that end later still would write to the log
            log.setLevel(level)


def check_copies(state) -> None:
    """Raises Rollback where devices that hold the same numbers hold other bits."""
    if apart := differing_copies(named_arrays(state), fingerprint):
        reason = f"copies of {apart[0]} came apart between devices (of {len(apart)} arrays)"
        raise Rollback(int(state.step), reason, skip=False)


def _signed(told: dict) -> dict:
    """A manifest with a digest of itself, so that damage to it is not taken for another model."""
    body = {key: value for key, value in told.items() if key != "digest"}
    text = json.dumps(body, sort_keys=True)
    return body | {"digest": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _check_names(wanted: dict, saved: dict, folder: Path) -> None:
    """Refuses a checkpoint of another model, which is no damage."""
    groups = {name.partition(".")[0] for name in wanted}
    for name in wanted | saved:
        if name.partition(".")[0] not in groups:
            continue  # of a part that is not asked for
        model, file = wanted.get(name), saved.get(name)
        model = "nothing" if model is None else f"{model.dtype} {list(model.shape)}"
        file = "nothing" if file is None else f"{file['dtype']} {file['shape']}"
        if model != file:
            raise UserError(
                f"the checkpoint in {folder} has {file} for {name} where the model has {model}: it"
                " was saved by another configuration"
            )


def digest(tree) -> str:
    """One text for all arrays of a tree: equal only when every bit is."""
    prints = manifest(named_arrays(tree))
    text = "".join(f"{name}{entry['fingerprint']}" for name, entry in sorted(prints.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
