"""The words of a report that lie beside the code, in TOML."""

from __future__ import annotations

import tomllib
from pathlib import Path


def texts(name: str) -> dict:
    """What the file of that name in this folder says, in its order."""
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))
