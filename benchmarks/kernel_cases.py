"""The calls that `kernel_speed.py` times: kernels, and what they are compared with."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from qkvjax.kernels import dispatch
from qkvjax.kernels.hopper import attention as hopper
from qkvjax.kernels.hopper import backward as hopper_backward
from qkvjax.kernels.hopper import block as hopper_block
from qkvjax.kernels.stored import KeyOfState
from qkvjax.kernels.triton import attention as triton
from qkvjax.kernels.triton import backward as triton_backward
from qkvjax.kernels.triton import decode as triton_decode

HEADS = {32: 12, 64: 32, 128: 16, 256: 8}  # head width -> query heads
MINI_WIDTH = 16
MINI_HEADS = 2
# FLOPs of a pass, as a multiple of those of causal attention forward, 2 B N T^2 H.
WORK = {"forward": 1, "keys": 2, "queries": 1.5, "both": 3.5}
HOPPER_BLOCKS = {"forward": hopper.FORWARD, "keys": hopper.KEYS, "queries": hopper.QUERIES}
# Sizes of tiles to try with Triton: the fields of `triton.Blocks`.
TRITON_BLOCKS = {
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
      what: a pass of a kernel ("forward", "keys", "queries"), the whole op ("forward", or "both"
        for forward and backward), or "decode": one token onto a full cache.
      impl: "hopper", "triton", "xla" or "cudnn".
      width: H, head width.
      tied: whether K = V.
      batch: B.
      length: T, tokens of a sequence or of a cache.
      heads: N.
      kv_heads: K.
      blocks: tile sizes; None means the kernel's own.
      splits: how many programs share a cache; None means the kernel's own.
      segments: whether sequences have several documents.
      raw: whether the cache has states without rotation, from which keys are made.
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
        values = dataclasses.asdict(self).values()
        return "-".join(str(x).replace(" ", "") for x in values if x not in (None, False))


def cases(part: str, mini: bool = False) -> Iterator[Case]:
    """Yields the cases of a part.

    Args:
      part: "tiles", "splits", "ops" or "caches".
      mini: a few small ones for a CPU.
    """
    if mini:
        for tied in (True, False):
            yield from _mini(part, tied)
        return
    makers = {"tiles": _tiles, "ops": _ops, "caches": _caches, "splits": _splits}
    for width, tied in itertools.product((128, 64, 256), (True, False)):
        yield from makers[part](width, tied)


def _case(
    what: str,
    impl: str,
    width: int,
    tied: bool,
    *,
    batch: int = 2,
    length: int = 8192,
    heads: int | None = None,
    kv_heads: int | None = None,
    **rest,
) -> Case:
    """Returns a case with as many query heads as its width usually has, and K = N."""
    heads = heads or HEADS[width]
    return Case(what, impl, width, tied, batch, length, heads, kv_heads or heads, **rest)


def _mini(part: str, tied: bool) -> Iterator[Case]:
    whats = {"ops": ("forward", "both"), "caches": ("decode",)}
    for what in whats.get(part, ()):
        yield _case(what, "xla", MINI_WIDTH, tied, length=32, heads=MINI_HEADS)


def _tiles(width: int, tied: bool) -> Iterator[Case]:
    """Yields the passes of both kernels with every size of tiles, and cuDNN beside them."""
    for what in ("forward", "both"):
        yield _case(what, "cudnn", width, tied)
    for what, sizes in TRITON_BLOCKS.items():
        for blocks in sizes:
            yield _case(what, "triton", width, tied, blocks=blocks)
    for blocks in itertools.product((64, 128), (64, 128, 256), (2, 3, 4)):
        for what in HOPPER_BLOCKS:
            yield _case(what, "hopper", width, tied, blocks=blocks)


def _ops(width: int, tied: bool) -> Iterator[Case]:
    """Yields attention over sequences of several lengths, head layouts and numbers of documents."""
    whats = ("forward", "both")
    for batch, length in ((64, 256), (16, 1024), (4, 4096), (1, 16384)):
        for impl, what in itertools.product(("hopper", "triton", "xla", "cudnn"), whats):
            if impl == "xla" and length > 4096:
                continue  # its memory grows with the square of the length
            yield _case(what, impl, width, tied, batch=batch, length=length)
            if impl != "cudnn" and length in (1024, 4096):
                yield _case(what, impl, width, tied, batch=batch, length=length, segments=True)
    if width == 128:
        for impl in ("hopper", "triton", "cudnn"):
            yield _case("both", impl, width, tied, heads=32, kv_heads=8)
    if width == 64:
        yield from _small_models(tied)
    for what in ("keys", "queries"):
        yield _case(what, "triton", width, tied)
        if (width, tied) in HOPPER_BLOCKS[what]:
            yield _case(what, "hopper", width, tied)


def _small_models(tied: bool) -> Iterator[Case]:
    """Yields the short sequences and narrow heads of small models, 16384 tokens a batch."""
    for width, length in ((32, 256), (32, 1024), (64, 64), (64, 128)):
        # The Hopper kernel has no heads of 32.
        impls = ("triton", "xla") if width == 32 else ("triton", "xla", "hopper")
        for impl in impls:
            yield _case(
                "both",
                impl,
                width,
                tied,
                batch=16384 // length,
                length=length,
                heads=12,
                segments=True,
            )


def _cache_sizes(width: int) -> Iterator[dict[str, int]]:
    """Yields batch, length and heads of the caches to read; only heads of 128 are timed."""
    if width != 128:
        return
    for batch, length, kv_heads in itertools.product((1, 8, 64), (4096, 32768), (1, 8, 32)):
        yield {"batch": batch, "length": length, "heads": 32, "kv_heads": kv_heads}


def _caches(width: int, tied: bool) -> Iterator[Case]:
    """Yields one token onto a cache, by Triton and by XLA."""
    for sizes in _cache_sizes(width):
        for impl in ("triton", "xla"):
            yield _case("decode", impl, width, tied, **sizes)
        if tied:
            yield _case("decode", "triton", width, tied, **sizes, raw=True)


def _splits(width: int, tied: bool) -> Iterator[Case]:
    """Yields one token onto a cache by Triton, with every size of tiles and number of splits."""
    for sizes in _cache_sizes(width):
        if sizes["kv_heads"] != 8:
            continue
        for blocks in itertools.product((64, 128, 256), (4, 8), (2, 3)):
            for programs in (132, 264, 528):  # 1, 2 and 4 for each processor of an H200
                splits = max(1, programs // (sizes["batch"] * sizes["kv_heads"]))
                yield _case(
                    "decode", "triton", width, tied, **sizes, blocks=(64, *blocks), splits=splits
                )


def program(case: Case, make: Callable) -> tuple[Callable, tuple]:
    """Returns a function that does the work of a case, and its arguments.

    Args:
      case: what to time.
      make: `make(shape, kind)` returns an argument; kinds are "random", "positions", "segments"
        and "numbers", one for each query and head.
    """
    if case.what == "decode":
        return _decode(case, make)
    if case.blocks is None and case.what in ("forward", "both"):
        return _op(case, make)
    return _pass(case, make)


def _sequences(case: Case, make: Callable) -> tuple:
    """Returns (segments, (q, k, v)) of a case; v is left out where K = V."""
    q_shape = (case.batch, case.length, case.heads, case.width)
    kv_shape = (case.batch, case.length, case.kv_heads, case.width)
    segments = make(q_shape[:2], "segments") if case.segments else None
    shapes = [q_shape, kv_shape] if case.tied else [q_shape, kv_shape, kv_shape]
    return segments, tuple(make(shape, "random") for shape in shapes)


def _op(case: Case, make: Callable) -> tuple[Callable, tuple]:
    """Returns attention as a whole, forward or with its gradients."""

    def attend(segments, q, k, v=None):
        if case.impl == "cudnn":
            value = k if v is None else v
            return jax.nn.dot_product_attention(q, k, value, is_causal=True, implementation="cudnn")
        kernels = {"hopper": hopper.attention, "triton": triton.attention}
        default = functools.partial(dispatch.attention, impl=case.impl)
        return kernels.get(case.impl, default)(q, k, v, segment_ids=segments)

    def op(segments, cotangent, *arrays):
        if case.what == "forward":
            return attend(segments, *arrays)
        output, backward = jax.vjp(functools.partial(attend, segments), *arrays)
        return output, backward(cotangent)

    segments, arrays = _sequences(case, make)
    cotangent = make((case.batch, case.length, case.heads, case.width), "random")
    return op, (segments, cotangent, *arrays)


def _pass(case: Case, make: Callable) -> tuple[Callable, tuple]:
    """Returns one pass of a kernel, with the tiles of the case."""
    segments, arrays = _sequences(case, make)
    is_hopper = case.impl == "hopper"
    options = _hopper_options(case) if is_hopper else _triton_options(case, *arrays)

    def parts(x):
        """Returns the parts of queries or keys: the Triton kernel takes a tuple of them."""
        return x if is_hopper else (x,)

    if case.what == "forward":
        forward_pass = (hopper if is_hopper else triton).forward_pass

        def forward(segments, q, k, v=None):
            return forward_pass(options, parts(q), parts(k), v, segments)

        return forward, (segments, *arrays)
    backward_pass = getattr(hopper_backward if is_hopper else triton_backward, f"{case.what}_pass")

    def gradients(segments, cotangent, normaliser, delta, q, k, v=None):
        return backward_pass(options, parts(q), parts(k), v, segments, cotangent, normaliser, delta)

    numbers = make((case.batch, case.heads, case.length), "numbers")
    cotangent = make((case.batch, case.length, case.heads, case.width), "random")
    return gradients, (segments, cotangent, numbers, numbers, *arrays)


def _hopper_options(case: Case) -> triton.Options:
    sizes = case.blocks
    if sizes is None:
        sizes = dataclasses.astuple(HOPPER_BLOCKS[case.what][case.width, case.tied])
    blocks = hopper_block.Blocks(*sizes)
    scale = case.width**-0.5
    return triton.Options(True, None, scale, case.length, blocks, (blocks, blocks), None)


def _triton_options(case: Case, q, k, v=None) -> triton.Options:
    blocks = triton.Blocks(*case.blocks) if case.blocks else None
    is_forward = case.what == "forward"
    return triton.settings(
        q,
        v,
        causal=True,
        window=None,
        scale=None,
        forward=blocks if is_forward else None,
        backward=None if is_forward else blocks,
        interpret=False,
    )


def _decode(case: Case, make: Callable) -> tuple[Callable, tuple]:
    """Returns one token through several layers.

    One layer would be too short to time, and its cache could stay in the processor's cache.
    """
    num_bytes = 2 * case.batch * case.kv_heads * case.length * case.width
    num_layers = max(1, min(16, int(3e8 / num_bytes)))
    options = {"key": KeyOfState(1e4, case.width, None)} if case.raw else {}
    if case.impl == "triton":
        blocks = triton.Blocks(*case.blocks) if case.blocks else None
        attend = functools.partial(triton_decode.decode, block=blocks, splits=case.splits)
    else:
        attend = functools.partial(dispatch.decode_attention, impl=case.impl)

    def decode(q, positions, *caches):
        for cache in caches:
            states = [jnp.swapaxes(x, 1, 2) for x in cache]
            q = attend(q, *states, positions=positions, **options)
        return q

    cache_shape = (case.batch, case.kv_heads, case.length, case.width)
    num_tensors = 1 if case.tied else 2
    caches = [[make(cache_shape, "random") for _ in range(num_tensors)] for _ in range(num_layers)]
    q = make((case.batch, 1, case.heads, case.width), "random")
    return decode, (q, make((case.batch, 1), "positions"), *caches)
