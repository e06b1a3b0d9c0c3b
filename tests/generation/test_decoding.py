"""Decoding through the cache equals the full forward pass, for every variant and layout."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.attention import cache as caches
from qkvjax.attention.layer import LAYERS, Attention
from qkvjax.attention.spec import SHARINGS, AttentionSpec
from qkvjax.generation import decode as decoding
from qkvjax.models.lm import LanguageModel

B, T = 2, 9


def legal():
    """Every sharing with every number of heads and, under RoPE, every value it allows.

    Position embeddings at the input alternate from case to case, and so does the query-key norm.
    Where the norm matters most, for a raw value beside a rotated and normed key, both cases occur.
    """
    positions = itertools.cycle(("none", "learned", "sincos"))
    norms = itertools.cycle((True, False, False, True, True))
    for sharing, heads in itertools.product(SHARINGS, (4, 2, 1)):
        if "q=" in sharing and heads < 4:
            continue
        common = {"sharing": sharing, "num_kv_heads": heads}
        yield common | {"position": next(positions), "qk_norm": next(norms)}
        shared_value = sharing in ("q-k=v", "q=v-k", "q=k=v")
        for values in ("raw", "rotated", "unrotated_output") if shared_value else ("raw",):
            rope = common | {"position": "rope", "rotary_values": values}
            both = values == "raw" and shared_value and heads == 4
            for qk_norm in (True, False) if both else (next(norms),):
                yield rope | {"qk_norm": qk_norm}


def name(fields):
    return "-".join(str(value) for value in fields.values())


@pytest.fixture(scope="module")
def ids():
    return jnp.asarray(np.random.default_rng(5).integers(0, 61, (B, T)))


def in_pieces(model, ids, sizes, layout, length=T + 3):
    """Logits [B, T, V] of `sizes` tokens at a time, through caches with room to spare."""
    blocks = model.stack.layers()
    cache = decoding.empty_caches(model, B, length, jnp.float32, layout)
    size = caches.num_bytes(cache)
    start = 0
    out = []
    for n in sizes:
        piece = ids[:, start : start + n]
        logits, cache = decoding.decode(
            model, blocks, cache, piece, jnp.int32(start), dtype=jnp.float32
        )
        out.append(logits)
        start += n
    assert caches.num_bytes(cache) == size
    wanted = (layer.cache_bytes(length, jnp.float32, layout) for layer in model.spec.layers)
    assert size == B * sum(wanted)
    return jnp.concatenate(out, axis=1)


def one_by_one(model, ids):
    """The full forward pass without `scan`, which would have to be compiled for each variant."""
    positions = jnp.tile(jnp.arange(T), (B, 1))
    x = model.embed(ids, positions)
    for block in model.stack.layers():
        x, _ = block(x, positions)
    return model.logits(model.norm(x))


def check(model, ids, full, layouts):
    full = np.asarray(full)
    for layout in layouts:
        for sizes in ([1] * T, [4, 4, 1]):
            got = np.asarray(in_pieces(model, ids, sizes, layout))
            np.testing.assert_allclose(got, full, atol=1e-5 * abs(full).max(), err_msg=layout)
            np.testing.assert_array_equal(got.argmax(-1), full.argmax(-1))


@pytest.mark.parametrize("fields", legal(), ids=name)
def test_cached_is_full(model, ids, fields):
    m = model(num_layers=1, **fields)
    check(m, ids, one_by_one(m, ids), ("kv", "shared") if m.spec.layers[0].shares_kv else ("kv",))


def test_cached_is_full_in_a_pattern_of_layers(model, ids):
    """Windows, a shared layer between others, biases and LayerNorm; half of each head rotated."""
    m = model(
        num_layers=4,
        rotary_fraction=0.5,
        norm="layernorm",
        mlp="gelu",
        use_bias=True,
        tie_embeddings=False,
        layer_overrides=({"window": 3}, {"sharing": "q-k=v", "num_kv_heads": 1}),
    )
    check(m, ids, m.logits(m.hidden(ids)[0]), (None, "kv"))


@pytest.mark.parametrize("values", ["raw", "unrotated_output"])
def test_cached_is_full_with_modified_scores(model, ids, values):
    """All modifiers at once, with keys that are built from the shared state at each read."""
    score = ("role_bias", "role_gain", "score2d(5)", "column_bias", "score_scale")
    m = model(num_layers=1, sharing="q-k=v", num_kv_heads=2, score=score, rotary_values=values)
    check(m, ids, one_by_one(m, ids), ("kv", "shared"))


VARIANTS = (
    {"position": "learned", "num_kv_heads": 2},
    {"sharing": "q-k=v", "position": "none", "num_kv_heads": 1},
    {"sharing": "q-k=v", "qk_norm": True},
    {"sharing": "q-k=v", "qk_norm": True, "score": ("role_gain", "column_bias")},
    {"sharing": "q=k=v", "rotary_values": "unrotated_output"},
)


@pytest.mark.parametrize("fields", VARIANTS, ids=name)
@pytest.mark.parametrize("page", [None, 4])
def test_sequences_of_different_lengths(model, ids, fields, page):
    """Each sequence continues from its length, in contiguous caches or pages in any order."""
    m = model(num_layers=1, **fields)
    full = np.asarray(one_by_one(m, ids))
    lengths = jnp.array([2, 6])
    blocks = m.stack.layers()
    table = None
    shape = (B, 12)
    if page:
        shape, table = (7, page), jnp.array([[5, 0, 2], [1, 6, 3]])
    cache = decoding.empty_caches(m, *shape, jnp.float32)
    step = jax.jit(
        lambda cache, ids, at: decoding.decode(
            m, blocks, cache, ids, at, table=table, dtype=jnp.float32
        )
    )
    # Both prompts are in one batch. The tokens behind the shorter one are overwritten or masked.
    _, cache = step(cache, ids[:, :6], jnp.array([0, 0]))
    for i in range(3):
        at = lengths + i
        logits, cache = step(cache, jnp.take_along_axis(ids, at[:, None], 1), at)
        wanted = full[np.arange(B), at]
        np.testing.assert_allclose(logits[:, 0], wanted, atol=1e-5 * abs(full).max())


@pytest.mark.parametrize("sharing", ["q-k-v", "q-k=v"])
def test_a_shared_prompt_leaves_the_pages_of_others_alone(model, ids, sharing):
    """The padding of a short prompt is dropped where it would lie beyond its sequence's pages."""
    m = model(num_layers=1, sharing=sharing, position="rope")
    full, lengths = np.asarray(one_by_one(m, ids)), jnp.array([8, 2])
    table = jnp.asarray(caches.block_table([9, 3], 4, 4))
    cache = decoding.empty_caches(m, 4, 4, jnp.float32)
    options = {"table": table, "dtype": jnp.float32}
    _, cache = decoding.decode(m, m.stack.layers(), cache, ids[:, :8], jnp.array([0, 0]), **options)
    last = jnp.take_along_axis(ids, lengths[:, None], 1)
    logits, _ = decoding.decode(m, m.stack.layers(), cache, last, lengths, **options)
    np.testing.assert_allclose(logits[:, 0], full[np.arange(B), lengths], atol=1e-5)


# (window, fields of the model): windows smaller and larger than the T = 9 tokens that are decoded.
WINDOWED = (
    (3, {"num_kv_heads": 2, "position": "rope", "qk_norm": True}),
    (4, {"sharing": "q-k=v", "position": "rope", "rotary_values": "raw", "qk_norm": True}),
    (1, {"sharing": "q-k=v", "position": "rope", "rotary_values": "rotated", "num_kv_heads": 1}),
    (7, {"sharing": "q-k=v", "position": "rope", "rotary_values": "unrotated_output"}),
    (3, {"sharing": "q-k=v", "position": "rope", "score": ("role_gain", "column_bias")}),
    (20, {"sharing": "q-k=v", "position": "rope", "rotary_values": "raw"}),
)


def windowed(model, window, fields):
    return model(num_layers=1, layer_overrides=({"window": window},), **fields)


@pytest.mark.parametrize(("window", "fields"), WINDOWED, ids=str)
def test_a_windowed_layer_caches_its_window_only(model, ids, window, fields):
    """Decoding through a ring equals the full pass, one token or several at a time, and the ring
    has the bytes of the window."""
    m = windowed(model, window, fields)
    full = np.asarray(one_by_one(m, ids))
    (cache,) = decoding.empty_caches(m, B, T + 3, jnp.float32)
    assert caches.cache_slots(cache) == min(window, T + 3)
    for sizes in ([1] * T, [4, 1, 4]):
        got = np.asarray(in_pieces(m, ids, sizes, None))
        np.testing.assert_allclose(got, full, atol=1e-5 * abs(full).max(), err_msg=str(sizes))


@pytest.mark.parametrize(("window", "fields"), WINDOWED[:2], ids=str)
def test_rings_of_different_lengths(model, ids, window, fields):
    """Each sequence continues from its length, by one token and by several."""
    m = windowed(model, window, fields)
    full, layers = np.asarray(one_by_one(m, ids)), m.stack.layers()

    def prompt(row, length):
        cache = decoding.empty_caches(m, 1, T + 3, jnp.float32)
        piece = ids[row : row + 1, :length]
        return decoding.decode(m, layers, cache, piece, jnp.int32(0), dtype=jnp.float32)[1]

    starts = jnp.array([2, 5])
    cache = jax.tree.map(lambda *a: jnp.concatenate(a), prompt(0, 2), prompt(1, 5))
    for count in (1, 2, 1):
        taken = starts[:, None] + jnp.arange(count)
        piece = jnp.take_along_axis(ids, taken, 1)
        logits, cache = decoding.decode(m, layers, cache, piece, starts, dtype=jnp.float32)
        wanted = full[np.arange(B)[:, None], taken]
        np.testing.assert_allclose(logits, wanted, atol=1e-5 * abs(full).max())
        starts = starts + count


def test_a_ring_in_int8_equals_a_whole_cache_in_int8(model, ids, monkeypatch):
    fields = {"sharing": "q-k=v", "position": "rope", "rotary_values": "raw"}
    m = windowed(model, 3, fields)

    def logits():
        cache = decoding.empty_caches(m, B, T, jnp.int8)
        out, start = [], 0
        for n in (4, 1, 1, 3):
            piece, at = ids[:, start : start + n], jnp.int32(start)
            one, cache = decoding.decode(m, m.stack.layers(), cache, piece, at, dtype=jnp.float32)
            out.append(one)
            start += n
        return caches.num_bytes(cache), np.concatenate(out, axis=1)

    ring_bytes, ring = logits()
    monkeypatch.setattr(AttentionSpec, "cache_slots", lambda self, length: length)
    whole_bytes, whole = logits()
    assert whole_bytes == ring_bytes * T // 3
    np.testing.assert_allclose(ring, whole, atol=1e-5 * abs(whole).max())


def test_pages_keep_all_tokens_of_a_window(model):
    m = windowed(model, 3, {})
    cache, table = decoding.make_caches(m, B, 12, jnp.float32, page_size=4)
    assert caches.num_bytes(cache) == B * 12 * m.spec.cache_bytes_per_token("float32")
    assert table.shape == (B, 3)


class Stretched(Attention):
    def _rotate(self, x, positions, inverse=False):
        return super()._rotate(x, 3 * positions, inverse)


class Opposed(Attention):
    def expand(self, entry, positions):
        k, v = super().expand(entry, positions)
        return -k, v


@pytest.mark.parametrize("variant", [Stretched, Opposed])
def test_a_subclass_that_makes_keys_differently(model, ids, variant, monkeypatch):
    """Its methods are used in decoding too, not a kernel that makes the keys of the usual layer."""
    fields = {"num_layers": 1, "sharing": "q-k=v", "position": "rope", "rotary_values": "raw"}
    usual = np.asarray(one_by_one(model(**fields), ids))
    monkeypatch.setitem(LAYERS, AttentionSpec, variant)
    m = model(**fields)
    full = np.asarray(one_by_one(m, ids))
    assert abs(full - usual).max() > 0.1 * abs(full).max()
    check(m, ids, full, ["shared"])


def test_tokens_are_written_in_place(model):
    """The loop over tokens does not allocate a second cache."""
    for fields in ({"sharing": "q-k-v"}, {"sharing": "q-k=v", "rotary_values": "raw"}):
        m = model(num_layers=2, position="rope", **fields)
        cache = decoding.empty_caches(m, 2, 2048, jnp.float32)
        lowered = decoding.sample_tokens.lower(
            m,
            m.stack.layers(),
            cache,
            jnp.zeros((2, 64)),
            jnp.int32(9),
            jax.random.key(0),
            jnp.float32(1),
            dtype=jnp.float32,
            max_tokens=8,
            num_ids=61,
            greedy=True,
        )
        temporary = lowered.compile().memory_analysis().temp_size_in_bytes
        assert temporary < caches.num_bytes(cache) / 2, fields


@pytest.mark.parametrize("page", [None, 4])
def test_int8_is_close(model, ids, page):
    """One byte a number costs little precision, for keys and values and for a shared state."""
    for fields in VARIANTS[:3]:
        m = model(num_layers=1, **fields)
        full = np.asarray(one_by_one(m, ids))
        table = None
        shape = (B, 12)
        if page:
            shape, table = (B * 3, page), jnp.asarray(caches.block_table([12] * B, page, B * 3))
        cache = decoding.empty_caches(m, *shape, jnp.int8)
        assert caches.num_bytes(cache) == B * 12 * m.spec.cache_bytes_per_token("int8")
        logits_of_tokens = []
        for i in range(T):
            logits, cache = decoding.decode(
                m,
                m.stack.layers(),
                cache,
                ids[:, i : i + 1],
                jnp.int32(i),
                table=table,
                dtype=jnp.float32,
            )
            logits_of_tokens.append(logits)
        error = np.abs(jnp.concatenate(logits_of_tokens, 1) - full).max() / np.abs(full).max()
        assert 1e-6 < error < 0.02, fields


@pytest.mark.parametrize("size", [1, 4, 9, 512])
def test_a_prompt_in_pieces(model, ids, size, monkeypatch):
    m = model(num_layers=1, sharing="q-k=v")
    monkeypatch.setattr(decoding, "PREFILL", size)
    cache = decoding.empty_caches(m, B, 12, jnp.float32)
    logits, _ = decoding.prefill(m, m.stack.layers(), cache, ids, dtype=jnp.float32)
    np.testing.assert_allclose(logits, m.logits(m.hidden(ids)[0])[:, -1], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_allocated_bytes_of_a_pattern(tiny, dtype):
    """Each layer in its smallest layout: two tensors of 4 heads, or one of 1 head."""
    spec = tiny(num_layers=4, layer_overrides=({}, {"sharing": "q-k=v", "num_kv_heads": 1}))
    model = jax.eval_shape(lambda: LanguageModel(spec, key=jax.random.key(0)))
    size = caches.num_bytes(decoding.empty_caches(model, 3, 20, jnp.dtype(dtype)))
    assert size == 3 * 20 * spec.cache_bytes_per_token(dtype)
    assert size == 3 * 20 * 2 * (2 * 32 + 8) * jnp.dtype(dtype).itemsize
