"""What a workdir knows about the data and the tokenizer of its run, and checks before using them.

The tokenizer's files are copied into the workdir when the run begins: WORKDIR/tokenizer.json, or
GPT-2's two files, with WORKDIR/tokenizer_copy.json beside them, which says where they came from
and what their fingerprint is. The data stay where they are; run.json has their digest.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qkvjax import config as configs
from qkvjax.data.tokenizers import tokenizer_files, tokenizer_fingerprint
from qkvjax.errors import UserError
from qkvjax.files import read_json, require_keys, write_json

RECORD = "tokenizer_copy.json"
# Fields that say where something lies. What lies there is identified by its digest.
LOCATIONS = ("data.source", "data.tokenizer")


def keep_tokenizer(workdir: Path, name: str, expected: str | None = None) -> str:
    """Copies a tokenizer's files into a workdir, unless they are there.

    Args:
      workdir: of a run, or of an imported model.
      name: `data.tokenizer`.
      expected: the fingerprint of the tokenizer that is in use; None means that of the files.

    Returns:
      The name that reads the copy, as `data.tokenizer`; "bytes" is returned as it is.

    Raises:
      UserError: the files are not those of the tokenizer in use, or another file is in the way.
    """
    files = tokenizer_files(name)
    if not files:
        return name
    copy = _copy_name(workdir, name)
    fingerprint = tokenizer_fingerprint(name)
    if expected not in (None, fingerprint):
        raise UserError(
            f"the files of data.tokenizer={name!r} changed while the run began: start again when"
            " nothing writes to them"
        )
    recorded = _record(workdir)
    if recorded.get("fingerprint") == fingerprint and _fingerprint(copy) == fingerprint:
        return copy
    for file in files:
        target = workdir / _copied_as(name, file)
        if target.exists() and target.samefile(file):
            continue
        if target.exists() and not recorded:
            raise UserError(
                f"{target} is in the way of a copy of data.tokenizer={name!r}: move that file, or"
                " choose another --workdir"
            )
        draft = target.with_name(f".{target.name}.partial")
        shutil.copyfile(file, draft)
        os.replace(draft, target)
    write_json(workdir / RECORD, {"tokenizer": name, "fingerprint": fingerprint})
    return copy


def workdir_tokenizer(workdir: Path, name: str) -> str:
    """Returns `data.tokenizer` as it is read from a workdir's copy.

    A workdir without a copy, of an earlier version, gets `name` back, or its imported
    tokenizer.json where that is what `name` was.

    Raises:
      UserError: the copy is not what was copied.
    """
    kind = name.partition(":")[0]
    if kind == "bytes":
        return name
    copy = _copy_name(workdir, name)
    recorded = _record(workdir)
    if not recorded:
        imported = kind == "bpe" and (workdir / "origin.json").exists()
        return copy if imported and (workdir / "tokenizer.json").is_file() else name
    if recorded["tokenizer"].partition(":")[0] != kind:
        raise UserError(
            f"{workdir / 'config.json'} names data.tokenizer={name!r}, and the model was made with"
            f" {recorded['tokenizer']!r}: restore that file"
        )
    found = _fingerprint(copy)
    if found != recorded["fingerprint"]:
        state = f"has the fingerprint {found[:12]}" if found else "is missing"
        raise UserError(
            f"the tokenizer of {workdir} is not the one its model was trained with: {copy} {state},"
            f" and {recorded['fingerprint'][:12]} is expected; restore it from a copy of the"
            f" workdir or from {recorded['tokenizer']}, where it came from"
        )
    return copy


def check_tokenizer(workdir: Path, name: str) -> None:
    """Raises UserError when a run goes on with another tokenizer than it began with."""
    recorded = _record(workdir)
    if not recorded or not tokenizer_files(name):
        return
    if tokenizer_fingerprint(name) != recorded["fingerprint"]:
        raise UserError(
            f"data.tokenizer={name!r} is not the tokenizer that {workdir} was trained with, which"
            f" was read from {recorded['tokenizer']}: restore that file, go on with the copy by"
            f" --config.data.tokenizer={_copy_name(workdir, recorded['tokenizer'])}, or choose"
            " another --workdir"
        )


def trained_digest(workdir: Path) -> str | None:
    """Returns the digest of the data that a run was trained on; None where nothing was trained.

    Raises:
      UserError: run.json lacks it.
    """
    path = workdir / "run.json"
    facts = read_json(path)
    if not facts:
        return None
    require_keys(str(path), facts, data=dict)
    require_keys(f"{path}: data", facts["data"], digest=str)
    return facts["data"]["digest"]


def check_data(workdir: Path, source: str, digest: str) -> None:
    """Raises UserError when a run's data are used again and are not what it was trained on.

    Which documents are held out follows from the content of all of them, and of a few from their
    order: one file that was renamed, added or changed can make a held-out document training text.
    """
    trained = trained_digest(workdir)
    if trained not in (None, digest):
        raise UserError(
            f"data.source={source!r} is not what {workdir} was trained on (digest {trained[:12]},"
            f" now {digest[:12]}): files, their names or order, or the tokenizer changed, so"
            " documents that count as held out now may have been trained on. Restore the data, or"
            " score a corpus that the run never read, as a whole, with --data=text:PATH"
        )


def same_location(a: str, b: str) -> bool:
    """Returns whether two values of `data.source` are one place, however its path is written."""
    kinds, paths = zip(*((kind, path) for kind, _, path in (a.partition(":"), b.partition(":"))))
    if kinds[0] != kinds[1]:
        return False
    return paths[0] == paths[1] or os.path.realpath(paths[0]) == os.path.realpath(paths[1])


def _record(workdir: Path) -> dict:
    """The content of the record, checked; {} without one."""
    path = workdir / RECORD
    recorded = read_json(path)
    if recorded:
        require_keys(str(path), recorded, tokenizer=str, fingerprint=str)
    return recorded


def _copied_as(name: str, file: Path) -> str:
    """The name of a file's copy: a tokenizer.json may have been called anything."""
    return "tokenizer.json" if name.startswith("bpe:") else file.name


def _copy_name(workdir: Path, name: str) -> str:
    folder = Path(workdir).absolute()
    return f"bpe:{folder / 'tokenizer.json'}" if name.startswith("bpe:") else f"gpt2:{folder}"


def _fingerprint(name: str) -> str | None:
    """The fingerprint of a copy; None where a file is missing."""
    try:
        return tokenizer_fingerprint(name)
    except UserError:
        return None


def check_workdir(workdir: Path, config, digest: str) -> None:
    """Raises UserError when a workdir holds another run.

    Where the data are the same by their digest, how their paths are written does not count.
    """
    saved = workdir / "config.json"
    if not saved.exists():
        return
    old, new = configs.identity(configs.load(saved)), configs.identity(config)
    trained = trained_digest(workdir)
    if trained == digest:
        old |= {name: new[name] for name in LOCATIONS}
    if _only_longer(old, new):
        old["train.steps"] = new["train.steps"]
    if lines := configs.differing(old, new):
        raise UserError(
            f"{workdir} holds a run with another configuration; choose another --workdir, or"
            " go on with its own values (train.steps may grow under the schedules wsd and"
            " constant):\n  " + "\n  ".join(lines)
        )
    check_tokenizer(workdir, config.data.tokenizer)
    if trained not in (None, digest):
        raise UserError(
            f"{workdir} was trained on other data (digest {trained[:12]}, now {digest[:12]}):"
            " restore the data or choose another --workdir"
        )


def _only_longer(old: dict, new: dict) -> bool:
    """Whether the new run is the old one with more steps, under a schedule that allows it."""
    steps = old["train.steps"], new["train.steps"]
    counted = all(isinstance(value, int) for value in steps)
    return counted and steps[1] >= steps[0] and new["optimizer.schedule"] in ("constant", "wsd")
