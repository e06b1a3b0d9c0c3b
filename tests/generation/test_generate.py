"""Sampling: seeds, temperature, room in the cache, and ids that are never sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax.data.tokenizers import load_tokenizer
from qkvjax.errors import UserError
from qkvjax.generation import decode as decoding
from qkvjax.generation.generate import continuation, generate, prompt_ids
from qkvjax.parallel import host

PROMPT = np.array([7, 3, 11], np.int32)
IDS, NEW = 61, 8


@pytest.fixture(scope="module")
def small(model):
    return model(sharing="q-k=v", num_layers=1)


@pytest.fixture(scope="module")
def sample(small):
    def run(**options):
        return generate(small, PROMPT, **({"num_ids": IDS, "max_tokens": NEW} | options))

    return run


def test_temperature_zero_is_the_greedy_rollout(small, sample):
    got = sample(temperature=0, batch=2)
    ids = np.zeros((1, len(PROMPT) + NEW), np.int32)
    ids[0, : len(PROMPT)] = PROMPT
    full = jax.jit(lambda model, ids: model(ids))
    for t in range(len(PROMPT), ids.shape[1]):
        ids[0, t] = np.argmax(full(small, ids)[0, t - 1, :IDS])
    np.testing.assert_array_equal(got.ids, [ids[0, len(PROMPT) :]] * 2)
    assert got.ids.dtype == np.int32
    assert got.cache_length == ids.size
    assert got.tokens_per_second > 0
    other = sample(temperature=0, layout="kv", cache_length=20)
    np.testing.assert_array_equal(other.ids, got.ids[:1])
    assert got.cache_bytes == 2 * 11 * 32 * 4  # one tensor of 32 numbers a token
    assert other.cache_bytes == 20 * 2 * 32 * 4


def test_a_seed_fixes_the_samples(sample):
    first, again, other = (sample(seed=seed, batch=2).ids for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other) and np.any(first[0] != first[1])


def test_cache_in_bfloat16_is_half(sample):
    got = sample(dtype="bfloat16", max_tokens=2)
    assert got.cache_bytes == 5 * 32 * 2 and got.ids.shape == (1, 2)


@pytest.mark.parametrize("greedy", [True, False])
def test_rows_that_pad_the_vocabulary_are_never_sampled(small, greedy):
    """Ids 61, 62 and 63 have rows but no token; here their logits are the largest."""
    logits = jnp.zeros((40, 64)).at[:, IDS:].set(100.0)
    cache = decoding.empty_caches(small, 40, 2, jnp.float32)
    ids, _ = decoding.sample_tokens(
        small,
        small.stack.layers(),
        cache,
        logits,
        jnp.int32(0),
        jax.random.key(0),
        jnp.float32(1),
        dtype=jnp.float32,
        max_tokens=1,
        num_ids=IDS,
        greedy=greedy,
    )
    assert ids.shape == (40, 1) and int(ids.max()) < IDS
    assert greedy or len(np.unique(ids)) > 15


def test_pages_and_int8(sample):
    plain = sample(temperature=0, batch=2)
    paged = sample(temperature=0, batch=2, page_size=4)
    np.testing.assert_array_equal(paged.ids, plain.ids)
    assert paged.cache_length == 12 and paged.cache_bytes == 2 * 12 * 32 * 4
    small = sample(temperature=0, cache_dtype="int8", page_size=4)
    assert small.cache_bytes == 12 * (32 + 4 * 2)  # a scale of two bytes for each of 4 heads


def test_a_cache_too_short_says_how_many_bytes(sample):
    with pytest.raises(UserError, match=r"need 11 \(2,816 bytes\).*--cache_length"):
        sample(cache_length=10, batch=2)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        (
            {"position": "learned", "seq_len": 10},
            {},
            "11 tokens exceeds the 10 positions",
        ),
        ({}, {"layout": "shared"}, "'shared'.*'q-k-v'.*use layout 'kv'"),
        ({}, {"layout": "paged"}, "'paged' is unknown"),
    ],
)
def test_what_a_model_does_not_support(model, fields, options, message):
    with pytest.raises(UserError, match=message):
        generate(model(**fields), PROMPT, num_ids=IDS, max_tokens=NEW, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"temperature": -0.5}, "temperature must be at least 0"),
        ({"dtype": "float12"}, "dtype 'float12' is unknown"),
        ({"cache_dtype": "int3"}, "dtype 'int3' is unknown"),
        ({"cache_dtype": "float64"}, "needs JAX_ENABLE_X64=1: set it, or use float32"),
        ({"page_size": 0}, "page_size=0 must be at least 1"),
        ({"page_size": 4, "cache_length": 7}, r"cache of 8 tokens .* need 11 \(1,408 bytes\)"),
    ],
)
def test_bad_options(sample, options, message):
    with pytest.raises(UserError, match=message):
        sample(**options)


def test_a_cache_larger_than_free_memory_is_refused_before_it_is_made(sample, monkeypatch):
    monkeypatch.setattr(host, "free_memory", lambda: 1000)
    with pytest.raises(UserError, match="takes 1,408 bytes, more than is free here"):
        sample()


def test_text_in_and_out():
    tokenizer = load_tokenizer("bytes")
    ids = prompt_ids(tokenizer, "né")
    assert ids.tolist() == [tokenizer.separator, *"né".encode()] and ids.dtype == np.int32
    assert continuation(tokenizer, ids[1:]) == "né"
    cut = np.array([*b"ab", tokenizer.separator, *b"cd", tokenizer.separator])
    assert continuation(tokenizer, cut) == "ab"
