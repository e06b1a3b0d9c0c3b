"""What `kernel_speed.py` times: one call of a kernel, or of what it is compared with."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from qkvjax.kernels import dispatch
from qkvjax.kernels.hopper import attention as hopper
from qkvjax.kernels.hopper import backward as hopper_backward
from qkvjax.kernels.hopper import block as hopper_block
from qkvjax.kernels.stored import KeyOfState
from qkvjax.kernels.triton import attention as triton
from qkvjax.kernels.triton import decode as triton_decode

HEADS = {32: 12, 64: 32, 128: 16, 256: 8}
# Causal attention does 2 B N T^2 H operations forward; the kernels' passes, so many times that.
WORK = {"forward": 1, "keys": 2, "queries": 1.5, "both": 3.5}
MOSAIC = {"forward": hopper.FORWARD, "keys": hopper.KEYS, "queries": hopper.QUERIES}
SIZES = {  # of tiles, that are tried
    "forward": [
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 64, 4, 4),
        (64, 32, 4, 3),
        (128, 64, 4, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 8, 4),
        (128, 128, 8, 3),
    ],
    "keys": [
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 64, 8, 2),
        (32, 64, 4, 2),
        (64, 32, 4, 2),
        (64, 128, 4, 3),
        (64, 128, 8, 2),
        (64, 128, 8, 3),
        (128, 64, 4, 2),
    ],
    "queries": [
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 2),
        (64, 128, 4, 2),
        (64, 128, 4, 3),
        (128, 64, 4, 3),
        (128, 64, 8, 3),
        (128, 32, 8, 3),
    ],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One timed call.

    Attributes:
      what: a pass of a kernel (forward, keys, queries), the op's "forward" or "both"
        ways, or "decode": a token onto a full cache.
      impl: hopper, triton, xla or cudnn.
      blocks: tile sizes; None takes the kernel's own.
    """

    what: str
    impl: str
    width: int
    tied: bool
    batch: int
    length: int
    heads: int
    kv_heads: int
    blocks: tuple[int, ...] | None = None
    splits: int | None = None
    segments: bool = False
    raw: bool = False

    @property
    def name(self) -> str:
        facts = dataclasses.asdict(self).values()
        return "-".join(str(x).replace(" ", "") for x in facts if x not in (None, False))


def cases(part: str, mini: bool = False) -> Iterator[Case]:
    """All of a part: "tiles" and "splits" look for sizes, "ops" and "caches" compare."""
    for width, tied in itertools.product((16,) if mini else (128, 64, 256), (True, False)):
        heads = HEADS.get(width, 2)

        def case(what, impl, batch=2, length=8192, width=width, tied=tied, heads=heads, **rest):
            return Case(
                what, impl, width, tied, batch, length, heads, rest.pop("kv_heads", heads), **rest
            )

        if mini and part == "ops":
            yield from (case(what, "xla", length=32) for what in ("forward", "both"))
        elif mini and part == "caches":
            yield case("decode", "xla", length=32)
        elif mini:
            return
        elif part == "tiles":
            for what in ("forward", "both"):
                yield case(what, "cudnn")
            for what, sizes in SIZES.items():
                yield from (case(what, "triton", blocks=blocks) for blocks in sizes)
            for blocks in itertools.product((64, 128), (64, 128, 256), (2, 3, 4)):
                yield from (case(w, "hopper", blocks=blocks) for w in MOSAIC)
        elif part == "ops":
            for batch, length in ((64, 256), (16, 1024), (4, 4096), (1, 16384)):
                for impl, what in itertools.product(
                    ("hopper", "triton", "xla", "cudnn"), ("forward", "both")
                ):
                    if impl == "xla" and length > 4096:
                        continue
                    yield case(what, impl, batch, length)
                    if impl != "cudnn" and length in (1024, 4096):
                        yield case(what, impl, batch, length, segments=True)
            for impl in ("hopper", "triton", "cudnn"):
                if width == 128:
                    yield case("both", impl, heads=32, kv_heads=8)
            for narrow, length in ((32, 256), (32, 1024), (64, 64), (64, 128)):
                if width == 64:
                    for impl in ("triton", "xla", "hopper")[: 2 if narrow == 32 else 3]:
                        yield case(
                            "both", impl, 16384 // length, length, narrow, heads=12, segments=True
                        )
            for what, table in (("keys", hopper.KEYS), ("queries", hopper.QUERIES)):
                yield case(what, "triton")
                if (width, tied) in table:
                    yield case(what, "hopper")
        elif width == 128:
            many = itertools.product((1, 8, 64), (4096, 32768), (1, 8, 32))
            for batch, length, kv_heads in many:
                rest = {"batch": batch, "length": length, "heads": 32, "kv_heads": kv_heads}
                if part == "caches":
                    yield from (case("decode", impl, **rest) for impl in ("triton", "xla"))
                    if tied:
                        yield case("decode", "triton", **rest, raw=True)
                elif kv_heads == 8:
                    for sizes in itertools.product((64, 128, 256), (4, 8), (2, 3)):
                        for programs in (132, 264, 528):
                            splits = max(1, programs // (batch * kv_heads))
                            yield case(
                                "decode", "triton", **rest, blocks=(64, *sizes), splits=splits
                            )


def program(case: Case, make):
    """(function, arguments); `make(shape, kind)` makes an argument of random numbers, or of
    "places", "segments" or "numbers" of rows."""
    q = case.batch, case.length, case.heads, case.width
    kv = case.batch, case.length, case.kv_heads, case.width
    if case.what == "decode":
        return _decode(case, make)
    segments = make(q[:2], "segments") if case.segments else None
    arrays = make(q, "random"), make(kv, "random"), *([] if case.tied else [make(kv, "random")])
    if case.blocks is None and case.what in ("forward", "both"):
        return _op(case), (segments, make(q, "random"), *arrays)
    blocks = case.blocks
    if case.impl == "hopper":
        blocks = hopper_block.Blocks(
            *blocks or dataclasses.astuple(MOSAIC[case.what][case.width, case.tied])
        )
        options = triton.Options(
            True, None, case.width**-0.5, case.length, blocks, (blocks, blocks), None
        )
    else:
        blocks = blocks and triton.Blocks(*blocks)
        options = triton.settings(
            arrays[0],
            None if case.tied else arrays[2],
            causal=True,
            window=None,
            scale=None,
            forward=blocks if case.what == "forward" else None,
            backward=None if case.what == "forward" else blocks,
            interpret=False,
        )
    wrap = (lambda x: x) if case.impl == "hopper" else (lambda x: (x,))
    if case.what == "forward":
        run = {"hopper": hopper, "triton": triton}[case.impl].forward_pass
        return (lambda segments, q, k, v=None: run(options, wrap(q), wrap(k), v, segments)), (
            segments,
            *arrays,
        )
    numbers = make((case.batch, case.heads, case.length), "numbers")
    run = getattr(hopper_backward if case.impl == "hopper" else triton, f"{case.what}_pass")

    def gradients(segments, slope, normaliser, delta, q, k, v=None):
        return run(options, wrap(q), wrap(k), v, segments, slope, normaliser, delta)

    return gradients, (segments, make(q, "random"), numbers, numbers, *arrays)


def _op(case):
    """The op, forward or with its gradients."""

    def attend(segments, q, k, v=None):
        if case.impl == "cudnn":
            value = k if v is None else v
            return jax.nn.dot_product_attention(q, k, value, is_causal=True, implementation="cudnn")
        kernel = {"hopper": hopper.attention, "triton": triton.attention}.get(
            case.impl, functools.partial(dispatch.attention, impl=case.impl)
        )
        return kernel(q, k, v, segment_ids=segments)

    def op(segments, slope, *arrays):
        if case.what == "forward":
            return attend(segments, *arrays)
        out, back = jax.vjp(functools.partial(attend, segments), *arrays)
        return out, back(slope)

    return op


def _decode(case, make):
    """Layers one after the other, so that neither their start nor what a cache of the processor
    holds of one of them counts."""
    held = case.batch, case.kv_heads, case.length, case.width
    size = 2 * case.batch * case.kv_heads * case.length * case.width
    layers = max(1, min(16, int(3e8 / size)))
    options = {"key": KeyOfState(1e4, case.width, None)} if case.raw else {}
    run = functools.partial(dispatch.decode_attention, impl=case.impl)
    if case.impl == "triton":
        blocks = case.blocks and triton.Blocks(*case.blocks)
        run = functools.partial(triton_decode.decode, block=blocks, splits=case.splits)

    def decode(q, positions, *caches):
        for cache in caches:
            cache = [jnp.swapaxes(x, 1, 2) for x in cache]
            q = run(q, *cache, positions=positions, **options)
        return q

    caches = [[make(held, "random") for _ in range(2 - case.tied)] for _ in range(layers)]
    one = case.batch, 1, case.heads, case.width
    return decode, (make(one, "random"), make((case.batch, 1), "places"), *caches)
