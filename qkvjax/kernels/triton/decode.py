"""Decoding in Pallas through Triton: a few new tokens onto a cache that is read once.

With K = V one tile is loaded and used twice. Where keys are normed and rotated but values are
not (`rotary_values=raw`), the tile is the shared state: its key is made in registers.

The cache is cut into splits that run side by side; each leaves the state of its online softmax,
and the states are merged afterwards (flash decoding). Letters: B sequences, S slots, N query
heads, K key-value heads, H head width, R rows: the new tokens of all query heads of a K.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qkvjax.errors import UserError
from qkvjax.kernels import limits, tile
from qkvjax.kernels import rows as rows_of
from qkvjax.kernels.stored import NORM_EPSILON, Int8, KeyOfState
from qkvjax.kernels.triton import attention as triton
from qkvjax.kernels.triton.attention import NARROWEST, Blocks, pallas, widened

# Two programs fit each of the 132 processors of a Hopper GPU where a tile of all that is cached
# has so many bytes and three stages; larger tiles where there are more programs than that. Timed
# on an H200 (benchmarks/results/h200/splits.jsonl).
PROGRAMS, FEWEST_SLOTS = 264, 256
TILE_BYTES = 32 * 1024


def block_of(width: int, itemsize: int, tied: bool, programs: int, makes_keys: bool) -> Blocks:
    """Tile sizes for so many programs (or splits of them)."""
    if makes_keys:  # in registers
        return Blocks(64, 64 if width <= 128 else 32, 4, 3)
    size = TILE_BYTES * (1 if programs <= PROGRAMS else 2) // (width * itemsize)
    return Blocks(64, min(256, size if tied else size // 2), 4, 3)


def refusal(q, v=None, *, page: int | None = None, **_) -> str | None:
    """Why the kernel does not take such arguments (`page`: slots of one); None where it does."""
    why = limits.refusal(q, v, triton.WIDTHS, triton.DTYPES)
    if why or page is None or (page >= NARROWEST and page & (page - 1) == 0):
        return why
    return f"a page has a power of two of slots from {NARROWEST} on, not {page}"


def cannot_make(key: KeyOfState, head_width: int) -> str | None:
    """Why the kernel cannot make such keys; None where it can."""
    if not key.width:
        return "it makes no keys that are normed and not rotated"
    pieces = pieces_of(key.width, head_width)
    if all(piece >= NARROWEST and piece & (piece - 1) == 0 for piece in pieces):
        return None
    return (
        f"it rotates {key.width} of {head_width} numbers only where half of the former is one of"
        f" the powers of two from {NARROWEST} on and what is left a multiple of {NARROWEST}"
    )


def pieces_of(turned: int, width: int) -> tuple[int, ...]:
    """How a head is cut into tiles: the halves that turn, and the rest by powers of two."""
    rest = width - turned
    powers = (1 << i for i in reversed(range(rest.bit_length())) if rest >> i & 1)
    return (turned // 2, turned // 2, *powers)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is fixed when the kernel is compiled."""

    window: int | None
    scale: float
    slots: int
    per_split: int
    tile: int
    page: int
    pieces: tuple[int, ...]


def decode(
    q,
    k,
    v=None,
    *,
    positions,
    window=None,
    scale=None,
    q_pe=None,
    k_pe=None,
    key: KeyOfState | None = None,
    table=None,
    splits: int | None = None,
    block: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `kernels.dispatch.decode_attention`, whose arguments these are.

    Args:
      splits: parts of the cache that run side by side; None chooses.

    Raises:
      UserError: `refusal` or `cannot_make` has an answer.
    """
    why = refusal(q, v, page=None if table is None else k.shape[1])
    why = why or (key and cannot_make(key, q.shape[-1]))
    if why:
        raise UserError(f"the triton kernel takes no such attention: {why}; use impl='auto'")
    batch, length, heads, width = q.shape
    num_kv_heads, group = k.shape[2], heads // k.shape[2]
    block = block or block_of(
        width, q.dtype.itemsize, v is None, batch * num_kv_heads, key is not None
    )
    fill = NARROWEST - k.shape[1]
    if fill > 0:  # of a cache shorter than the smallest tile
        k, v, k_pe = jax.tree.map(
            lambda x: jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2)), (k, v, k_pe)
        )
    # A tile lies within a page.
    size = min(block.keys, 1 << (k.shape[1].bit_length() - 1))
    slots = k.shape[1] * (1 if table is None else table.shape[1])
    # As a cache is stored; these transpositions and those of its views cancel.
    k, v, k_pe = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), (k, v, k_pe))
    if splits is None:
        splits = max(1, min(PROGRAMS // (batch * num_kv_heads), slots // FEWEST_SLOTS))
    per_split = -(-slots // splits // size) * size if slots // splits >= size else size
    splits = -(-slots // per_split)
    options = Options(
        window,
        width**-0.5 if scale is None else float(scale),
        slots,
        per_split,
        size,
        k.shape[2],
        (width,) if key is None else pieces_of(key.width, width),
    )

    # Rows go by tiles as well: a prompt that enters a cache has many.
    tall = min(max(NARROWEST, pl.next_power_of_2(length * group)), block.queries)
    rows = -(-length * group // tall) * tall

    packed = functools.partial(rows_of.packed, kv_heads=num_kv_heads, rows=rows)
    places = rows_of.places(positions, group, rows)
    tiles = per_split // size  # of a split, whose spans count from its own first one
    spans = rows_of.spans(positions, window, size)[:, None]
    spans = jnp.clip(spans - tiles * jnp.arange(splits)[:, None], 0, tiles)
    turns = gains = None
    if key is not None:
        turns = key.at(slots, jnp.float32)
        gains = None if key.gain is None else key.gain.astype(jnp.float32)
    second = None
    if q_pe is not None:
        second = packed(widened(q_pe.astype(q.dtype))), widened(k_pe.astype(q.dtype))

    value_pieces = options.pieces if v is None else (v.shape[3],)
    inputs = spans, packed(q), k, v, table, second, turns, gains, places
    held = functools.partial(_slots, paged=table is not None)
    specs = (
        pl.BlockSpec((None, None, 4), lambda b, n, i: (b, i % splits, 0)),
        _rows(inputs[1], tall, splits),
        *(jax.tree.map(held, x) for x in (k, v)),
        None if table is None else _pages(table),
        None if second is None else (_rows(second[0], tall, splits), _slots(second[1])),
        *(jax.tree.map(_table, x) for x in (turns, gains)),
        _places(tall, splits),
    )
    lead = batch, num_kv_heads, splits, rows
    state = functools.partial(_state, tall, splits)
    wanted = lambda *last: jax.ShapeDtypeStruct((*lead, *last), jnp.float32)  # noqa: E731
    top, total, mixed = pallas(
        functools.partial(_kernel, options, splits),
        "attention_decode",
        interpret,
        block,
        grid=(batch, num_kv_heads, rows // tall * splits),
        in_specs=list(specs),
        out_specs=[state(), state(), [state(piece) for piece in value_pieces]],
        out_shape=[wanted(), wanted(), [wanted(piece) for piece in value_pieces]],
    )(*inputs)
    out = tile.merge(top, total, jnp.concatenate(mixed, axis=-1), axis=2)
    return rows_of.unpacked(out, length, heads).astype(q.dtype)


# Where program (sequence b, key-value head n, i) finds its part of an array; i counts the splits
# of each tile of rows.


def _rows(x, tall: int, splits: int):
    """A tile of one head's rows in [B, K, R, H]."""
    return pl.BlockSpec((None, None, tall, x.shape[3]), lambda b, n, i: (b, n, i // splits, 0))


def _slots(x, paged: bool = False):
    """One head of [B, K, S, ...], or of all pages [P, K, E, ...]."""
    zeros = (0,) * (x.ndim - 2)
    first = x.shape[0] if paged else None
    return pl.BlockSpec((first, None, *x.shape[2:]), lambda b, n, i: (0 if paged else b, n, *zeros))


def _pages(x):
    """One sequence's row of the block table [B, n]."""
    return pl.BlockSpec((None, x.shape[1]), lambda b, n, i: (b, 0))


def _table(x):
    """All of it."""
    return pl.BlockSpec(x.shape, lambda b, n, i: (0,) * x.ndim)


def _places(tall: int, splits: int):
    """A tile of rows in [B, R]."""
    return pl.BlockSpec((None, tall), lambda b, n, i: (b, i // splits))


def _state(tall: int, splits: int, *last: int):
    """What a split leaves of a tile of rows in [B, K, splits, R, ...]."""
    zeros = (0,) * len(last)
    return pl.BlockSpec(
        (None, None, None, tall, *last), lambda b, n, i: (b, n, i % splits, i // splits, *zeros)
    )


def _kernel(options, splits, span, q, k, v, table, second, turns, gains, places, top, total, mixed):
    """One split of one sequence's cache for the rows of one key-value head."""
    size = options.tile
    edges = [sum(options.pieces[:i]) for i in range(len(options.pieces) + 1)]
    spans = [slice(a, b) for a, b in zip(edges, edges[1:])]
    queries = [q[:, span] for span in spans]
    rows = places[...][:, None]
    lowest = jax.lax.rem(pl.program_id(2), splits) * options.per_split
    gain = None if gains is None else [gains[span] for span in spans]

    def step(j, state, masked):
        # The last tile is moved back into the cache; what it then sees twice counts once.
        wanted = lowest + j * size
        first = jnp.minimum(wanted, options.slots - size)
        at = pl.ds(first, size)
        within = (at,)
        if table is not None:
            page = table[jax.lax.div(first, options.page)]
            within = (page, pl.ds(jax.lax.rem(first, options.page), size))
        held = [_load(k, within, span, q.dtype) for span in spans]
        keys = held if turns is None else _keys(options, held, gain, *(t[at, :] for t in turns))
        products = [tile.dot(a, b, (1, 1)) for a, b in zip(queries, keys)]
        if second is not None:
            products.append(tile.dot(second[0][...], second[1][at, :], (1, 1)))
        seen = None
        if masked:
            columns = (first + jax.lax.broadcasted_iota(jnp.int32, (size,), 0))[None, :]
            limits = {"causal": True, "window": options.window, "length": options.slots}
            seen = tile.visible(rows, columns, **limits) & (columns >= wanted)
        values = held if v is None else [_load(v, within, slice(None), q.dtype)]
        products = sum(products[1:], products[0])
        return tile.absorb(state, products, seen, values, options.scale)

    start = tile.nothing(rows.shape[0], [ref.shape[-1] for ref in mixed])
    edges = options.window is not None, True
    top[...], total[...], sums = tile.walk(span, step, start, edges)
    for ref, found in zip(mixed, sums):
        ref[...] = found


def _load(x, within, span, dtype):
    """Part of a tile of a cached tensor."""
    if not isinstance(x, Int8):
        return x[*within, span].astype(dtype)
    codes, scales = x.codes[*within, span], x.scales[within]
    return (codes.astype(jnp.float32) * scales.astype(jnp.float32)[:, None]).astype(dtype)


def _keys(options, held, gain, cos, sin):
    """The keys of a tile of stored states, piece by piece."""
    wide = [piece.astype(jnp.float32) for piece in held]
    if gain is not None:
        squares = [jnp.sum(piece * piece, axis=1) for piece in wide]
        mean = sum(squares[1:], squares[0]) / sum(options.pieces)
        factor = jax.lax.rsqrt(mean + NORM_EPSILON)[:, None]
        # Rounded where the layer rounds: what leaves the norm has the dtype of the state.
        wide = [(p * factor * g[None, :]).astype(held[0].dtype) for p, g in zip(wide, gain)]
        wide = [piece.astype(jnp.float32) for piece in wide]
    a, b, *rest = wide
    turned = [a * cos - b * sin, b * cos + a * sin, *rest]
    return [piece.astype(held[0].dtype) for piece in turned]
