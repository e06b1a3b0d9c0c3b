"""Attention on this device against the reference in float64 on the host: relative errors.

python benchmarks/correctness.py --output=results/correctness.jsonl
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ours import arguments, record

from qkvjax.kernels import dispatch

LIMIT = {"float32": 1e-3, "bfloat16": 3e-2}


def output_and_gradients(impl: str, *tensors) -> list[np.ndarray]:
    """Causal attention of (q, k, v), or of (q, k) with the keys as values, and the gradients of
    its sum of squares; float64 on the host."""

    def total(*tensors):
        out = dispatch.attention(*tensors, impl=impl)
        return jnp.sum(out.astype(jnp.promote_types(out.dtype, jnp.float32)) ** 2), out

    order = tuple(range(len(tensors)))
    gradients, out = jax.jit(jax.grad(total, argnums=order, has_aux=True))(*tensors)
    return [np.asarray(x, np.float64) for x in (out, *gradients)]


def truth(*tensors) -> list[np.ndarray]:
    """The same from `kernels.reference` in float64 on the CPU."""
    cpu = jax.devices("cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        wide = [jax.device_put(np.asarray(x, np.float64), cpu) for x in tensors]
        return output_and_gradients("reference", *wide)


def main() -> None:
    given = arguments(__doc__, length=256)
    worst = 0.0
    for dtype, limit in LIMIT.items():
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (jax.random.normal(key, (2, given.length, 4, 64), dtype) for key in keys)
        for sharing, tensors in (("q-k-v", (q, k, v)), ("q-k=v", (q, k)), ("q=k=v", (q,))):
            wanted = truth(*tensors)
            for impl in [i for i in dispatch.IMPLEMENTATIONS if not dispatch.missing(i)]:
                found = output_and_gradients(impl, *tensors)
                errors = {
                    name: float(np.linalg.norm(x - y) / np.linalg.norm(y))
                    for name, x, y in zip(("output", "dq", "dk", "dv"), found, wanted)
                }
                worst = max(worst, max(errors.values()) / limit)
                record(
                    given.output, benchmark="correctness", impl=impl, dtype=dtype, sharing=sharing,
                    limit=limit, **errors,
                )  # fmt: skip
    if not worst < 1:
        raise SystemExit(f"an error exceeds its limit, {worst:.2f} times")


if __name__ == "__main__":
    main()
