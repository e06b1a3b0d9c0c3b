"""The paper's models, reproduced to the last parameter, byte and multiply-add.

Kayyam et al. 2026: the language models of 300M and 1.2B, the synthetic encoder and the ViT.
The figures were counted from the shapes in the authors' code.
"""

import jax
import pytest

from qkvjax import config as configs
from qkvjax.attention.spec import AttentionSpec
from qkvjax.models.build import count
from qkvjax.models.lm import LanguageModel
from qkvjax.models.spec import ModelSpec, model_spec

# (sharing, key-value heads; 0 means all) -> parameters, bfloat16 cache bytes a token
LM_300M = {
    ("q-k-v", 0): (305_534_976, 81_920),
    ("q-k=v", 0): (284_542_976, 40_960),
    ("q=k-v", 0): (284_542_976, 81_920),
    ("q-k-v", 8): (284_542_976, 40_960),
    ("q-k-v", 4): (274_046_976, 20_480),
    ("q-k=v", 4): (268_798_976, 10_240),
    ("q-k-v", 1): (266_174_976, 5_120),
    ("q-k=v", 1): (264_862_976, 2_560),
    ("q=k=v", 0): (263_550_976, 40_960),
}
# The same -> parameters, MiB of cache at 32,768 tokens
LM_1_2B = {
    ("q-k-v", 0): (1_215_102_976, 5_632),
    ("q-k=v", 0): (1_122_783_232, 2_816),
    ("q-k-v", 8): (1_076_623_360, 1_408),
    ("q-k=v", 8): (1_053_543_424, 704),
    ("q-k-v", 1): (1_036_233_472, 176),
    ("q-k=v", 1): (1_033_348_480, 88),
}
GPT2_IDS = 50_257


@pytest.fixture(scope="module")
def paper(recipe):
    """The spec of the paper's recipe: (size, sharing, num_kv_heads) -> ModelSpec."""

    def make(size, sharing="q-k-v", num_kv_heads=0):
        arg = f"size={size},recipe=paper,sharing={sharing},num_kv_heads={num_kv_heads}"
        config = recipe("configs/lm.py", arg)
        return model_spec(configs.resolve(config).model, GPT2_IDS, config.data.seq_len)

    return make


@pytest.mark.parametrize(("variant", "expected"), LM_300M.items())
def test_language_model_of_300m(paper, variant, expected):
    spec = paper("300m", *variant)
    assert (spec.num_params, spec.cache_bytes_per_token("bfloat16")) == expected
    model = jax.eval_shape(lambda: LanguageModel(spec, key=jax.random.key(0)))
    assert count(model) == expected[0]


@pytest.mark.parametrize(("variant", "expected"), LM_1_2B.items())
def test_language_model_of_1_2b(paper, variant, expected):
    spec = paper("1.2b", *variant)
    mebibytes = 32_768 * spec.cache_bytes_per_token("bfloat16") / 2**20
    assert (spec.num_params, mebibytes) == expected
    model = jax.eval_shape(lambda: LanguageModel(spec, key=jax.random.key(0)))
    assert count(model) == expected[0]


def test_smallest_cache_is_a_64th(paper):
    """The paper prints 67, from rows in different units."""
    full, least = paper("1.2b"), paper("1.2b", "q-k=v", 1)
    assert full.cache_bytes_per_token() == 64 * least.cache_bytes_per_token()


@pytest.mark.parametrize(
    ("sharing", "at_2048", "at_128"),
    [
        ("q-k-v", 792.69, 39.48),
        ("q-k=v", 749.74, 36.79),
        ("q=k-v", 749.74, 36.79),
        ("q=k=v", 706.79, 34.11),
    ],
)
def test_forward_gigamacs_of_300m(paper, sharing, at_2048, at_128):
    spec = paper("300m", sharing)
    assert round(spec.forward_macs(2048) / 1e9, 2) == at_2048
    assert round(spec.forward_macs(128) / 1e9, 2) == at_128


def encoder_params(d_model, sharing, max_length):
    """Two pre-norm layers with biases everywhere, a last norm and learned positions."""
    layer = AttentionSpec(
        d_model=d_model, num_heads=2, sharing=sharing, causal=False, use_bias=True
    )
    body = ModelSpec(
        vocab_size=0,
        d_model=d_model,
        layers=(layer,) * 2,
        max_length=max_length,
        position="learned",
        norm="layernorm",
        mlp="gelu",
        d_ff=4 * d_model,
        use_bias=True,
    )
    return body.num_params


@pytest.mark.parametrize(
    ("d_model", "sharing", "expected"),
    [
        (32, "q-k-v", 30_250),
        (64, "q-k-v", 109_642),
        (64, "q-k=v", 101_322),
        (64, "q=k-v", 101_322),
        (64, "q=k=v", 93_002),
        (256, "q-k-v", 1_618_186),
        (256, "q-k=v", 1_486_602),
        (256, "q=k=v", 1_355_018),
    ],
)
def test_synthetic_encoder(d_model, sharing, expected):
    """One-hot digits of 10 through a linear map, 128 positions, a head over 10 digits."""
    linear_in, head = 10 * d_model + d_model, d_model * 10 + 10
    assert encoder_params(d_model, sharing, 128) + linear_in + head == expected


@pytest.mark.parametrize(("d_model", "expected"), [(64, 105_098), (256, 1_600_010)])
def test_vision_transformer_on_mnist(d_model, expected):
    """Patches of 4 x 4 of 28 x 28 pixels and a class token, a head over 10 classes."""
    patches, class_token, head = 16 * d_model + d_model, d_model, d_model * 10 + 10
    got = encoder_params(d_model, "q-k-v", 49 + 1) + patches + class_token + head
    assert got == expected
