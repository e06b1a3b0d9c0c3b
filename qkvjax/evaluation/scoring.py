"""Runs a compiled scoring program over the batches of a data set."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qkvjax.data.ahead import ahead
from qkvjax.parallel import host_batch, rules
from qkvjax.progress import Progress

# Tokens that a device scores at a time, unless a training micro-batch has fewer.
TOKENS = 2**14
# Batches that the host may be ahead of the device.
AHEAD = 4
# What a scoring program reads of a batch.
ARRAYS = ("inputs", "targets", "positions", "segment_ids", "weights")


def num_rows(config, mesh: jax.sharding.Mesh | None) -> int:
    """Rows of a scoring batch over all devices.

    A device scores TOKENS at a time and never more rows than it trains on at a time, so that
    scoring needs less memory than a training step.
    """
    ways = rows_multiple(mesh)
    sequence_ways = 1 if mesh is None else rules.ways("length", sizes=mesh.shape)
    trained = config.data.batch_size // config.train.accumulation // ways
    fitting = TOKENS * sequence_ways // config.data.seq_len
    return ways * max(1, min(trained, fitting))


def rows_multiple(mesh: jax.sharding.Mesh | None) -> int:
    """Rows of a batch are a multiple of this, so that every device has as many."""
    return 1 if mesh is None else rules.ways("batch", sizes=mesh.shape)


def abstract_batch(mesh: jax.sharding.Mesh | None, rows: int, seq_len: int) -> dict:
    """The arrays of a batch of text, [rows, seq_len], as ShapeDtypeStructs."""
    place = None if mesh is None else rules.sharding(mesh, "batch", "length")
    dtypes = dict.fromkeys(ARRAYS, jnp.int32) | {"weights": jnp.float32}
    shape = (rows, seq_len)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in dtypes.items()
    }


def run(
    program: Callable[[Mapping[str, jax.Array]], object],
    batches: Iterator[dict[str, np.ndarray]],
    mesh: jax.sharding.Mesh | None,
    num_labels: float = 0,
    *,
    pulse: Callable[[], None] = lambda: None,
    log: Callable[[str], None] | None = None,
) -> Iterator[tuple[dict[str, np.ndarray], object]]:
    """Runs a program over batches, which a thread makes and places in the meantime.

    The host waits only for the batch AHEAD before, so that the device always has work.

    Args:
      program: from the ARRAYS of a batch on the devices to a tree of arrays.
      num_labels: of all batches together, for the progress that is shown; 0 where not known.
      pulse: is called after each batch; what it raises ends the scoring.
      log: gets lines about progress; None shows none.

    Yields:
      (batch, the program's result on the host), in order.
    """

    def placed(batch):
        arrays = {name: batch[name] for name in ARRAYS if name in batch}
        return batch, arrays if mesh is None else host_batch.place(arrays, mesh)

    waiting: collections.deque = collections.deque()
    with Progress("scoring", num_labels, "labels", log=log, alive=pulse) as progress:
        for batch, arrays in ahead(map(placed, batches)):
            waiting.append((batch, program(arrays)))
            if len(waiting) > AHEAD:
                done, result = waiting.popleft()
                yield done, jax.device_get(result)
            progress.add(np.count_nonzero(batch["weights"]))
        for done, result in waiting:
            yield done, jax.device_get(result)
