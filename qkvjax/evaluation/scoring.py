"""Runs a compiled scoring program over the batches of a data set.

Three things happen at the same time: a thread makes batches and places them on the devices, the
devices run the program, and the caller adds up results. To read a result, the host waits for the
device. Therefore it reads each result AHEAD batches later, and the device always has work:

    host starts     0   1   2   3   4   5   6   ...
    host reads                      0   1   2   ...     with AHEAD = 4
"""

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
# Batches that are started and not read yet.
AHEAD = 4
# The arrays of a batch that a scoring program reads.
ARRAYS = ("inputs", "targets", "positions", "segment_ids", "weights")


def num_rows(config, mesh: jax.sharding.Mesh | None) -> int:
    """Returns the rows of a scoring batch over all devices.

    A device scores TOKENS at a time and never more rows than it trains on at a time, so that
    scoring needs less memory than a training step.
    """
    ways = rows_multiple(mesh)
    sequence_ways = 1 if mesh is None else rules.ways("length", sizes=mesh.shape)
    trained = config.data.batch_size // config.train.accumulation // ways
    fitting = TOKENS * sequence_ways // config.data.seq_len
    return ways * max(1, min(trained, fitting))


def rows_multiple(mesh: jax.sharding.Mesh | None) -> int:
    """Returns the number that divides the rows of a batch: then devices have equally many."""
    return 1 if mesh is None else rules.ways("batch", sizes=mesh.shape)


def abstract_batch(mesh: jax.sharding.Mesh | None, rows: int, seq_len: int) -> dict:
    """Returns the arrays of a batch of text, [rows, seq_len], as ShapeDtypeStructs."""
    sharding = None if mesh is None else rules.sharding(mesh, "batch", "length")
    dtypes = dict.fromkeys(ARRAYS, jnp.int32) | {"weights": jnp.float32}
    shape = (rows, seq_len)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, dtype in dtypes.items()
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
    """Runs a program over batches.

    Args:
      program: from the ARRAYS of a batch on the devices to a tree of arrays.
      batches: dicts of numpy arrays; a thread makes them ahead.
      mesh: where batches are placed; None is one device.
      num_labels: of all batches together, for the progress that is shown; 0 where not known.
      pulse: is called after each batch; an exception that it raises ends the scoring.
      log: gets lines about progress; None shows none.

    Yields:
      (batch, the program's result on the host), in order.
    """

    def place(batch):
        arrays = {name: batch[name] for name in ARRAYS if name in batch}
        return batch, arrays if mesh is None else host_batch.place(arrays, mesh)

    unread: collections.deque = collections.deque()
    with Progress("scoring", num_labels, "labels", log=log, alive=pulse) as progress:
        for batch, arrays in ahead(map(place, batches)):
            unread.append((batch, program(arrays)))
            if len(unread) > AHEAD:
                scored, result = unread.popleft()
                yield scored, jax.device_get(result)
            progress.add(np.count_nonzero(batch["weights"]))
        for scored, result in unread:
            yield scored, jax.device_get(result)
