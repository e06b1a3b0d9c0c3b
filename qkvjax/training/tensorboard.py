"""TensorBoard's event files: each record written whole, by nobody in the background."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path


class Events:
    """The event file of one part of a run.

    tensorboardX's own writer keeps records in a thread and a buffer, which on a full disk end in
    tracebacks of their own; of that package only the formats are used.

    Args:
      folder: made when it is not there.
      start: the step the run goes on from; TensorBoard drops what older files say of later ones.

    Raises:
      OSError: nothing can be written there; so do all methods.
    """

    def __init__(self, folder: Path, start: int = 0):
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "ab", buffering=0)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if start:
            again = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=start + 1, session_log=again))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One record of plain numbers."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=found)))

    def _write(self, event) -> None:
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checked = (length, struct.pack("<I", masked_crc32c(length)))
        self._file.write(b"".join((*checked, data, struct.pack("<I", masked_crc32c(data)))))

    def close(self) -> None:
        self._file.close()
