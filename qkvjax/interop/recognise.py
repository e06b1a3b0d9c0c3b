"""Recognises models that plan cannot count, by the keys of their files.

Anybody may choose any `model_type`; what the layers cache shows in other keys. A file with the keys
of a `Kind` is refused, unless its family is counted with that kind.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from qkvjax.interop.families import Family


@dataclasses.dataclass(frozen=True)
class Kind:
    """A feature that changes what a layer is or caches.

    Attributes:
      name: what `Family.kinds` has for a family that is counted with this feature.
      keys: regular expression of keys, matched as a whole; one such key with a value is enough.
      text: what such a file describes, for messages.
    """

    name: str
    keys: str
    text: str


_HYBRID = "a model with state-space, recurrent or linear-attention layers: they keep a state"
_EITHER_WAY = "an encoder, which attends in both directions and decodes nothing"
_VARYING = "layers that differ in their heads or widths, or share one another's"
KINDS = (
    Kind(
        "encoder-decoder",
        r"(num_)?(en|de)coder_layers|(en|de)coder_ffn_dim|(en|de)coder_attention_heads"
        r"|relative_attention_num_buckets|is_encoder_decoder|num_(en|de)coder_blocks",
        "an encoder-decoder, whose decoder also reads the encoder's output",
    ),
    Kind(
        "cross-attention",
        r"add_cross_attention|cross_attention_layers|cross_attention_freq|cross_layer_interval"
        r"|cross_attn_every_n_layers|num_cross_attention_layers|cross_attention_interval",
        "layers of cross attention, which cache another input's keys and values",
    ),
    Kind(
        "hybrid",
        r"hybrid_.*|_?block_types|layers?_block_types?|mixer_types?|attn_type_list"
        r"|attn_layer_(indices|period|offset|idxs?)|hyena_.*|attention_layers_idx|full_attention_interval"
        r"|full_attn_idxs|full_attention_idxs|mamba_.*|ssm_.*|linear_(attn|key|num|value|conv)_.*"
        r"|rwkv.*|m?lstm_.*|slstm_.*|state_size|lru_width|time_step_rank|recurrent_.*|conv_L_cache"
        r"|time_mix_.*|gla_.*|lightning_.*|retention_.*",
        _HYBRID,
    ),
    Kind("encoder", r"type_vocab_size|classifier_pooling|mask_token_prob", _EITHER_WAY),
    Kind(
        "varying",
        r"block_configs|num_(key_value|attention|query|kv)_heads_per_layer|ffn_multipliers"
        r"|num_query_heads|cla_share_factor|use_cla|per_layer_config|ffn_hidden_sizes"
        r"|layer_sharing|num_loops|total_ut_steps",
        _VARYING,
    ),
    Kind(
        "streams",
        r"altup_num_inputs|laurel_rank|hc_mult|zero_expert_num",
        "extra streams or experts of a kind that plan does not count",
    ),
    Kind(
        "draft", r"draft_vocab_size|speculators_.*|eagle_.*", "a draft model, of another's layers"
    ),
    Kind(
        "sparse",
        r"sparse_attention_config|sparse_config|blocksparse_.*|dense_attention_every_n_layers"
        r"|compress_ratios?|o_lora_rank",
        "sparse or compressed attention, whose cache plan does not count",
    ),
    Kind(
        "indexer",
        r"index_(topk|n_heads|head_dim)",
        "attention with an indexer, which caches further keys",
    ),
    Kind(
        "chunked",
        r"attention_chunk_size",
        "chunked attention, whose layers cache at most one chunk",
    ),
    Kind(
        "latent",
        r"(kv|q)_lora_rank|qk_(rope|nope)_head_dim",
        "multi-head latent attention, whose layers cache a latent",
    ),
    Kind(
        "multi-query",
        r"multi_query(_attention|_group_num)?|n_head_kv|num_kv_heads|kv_n_heads"
        r"|new_decoder_architecture|attn_config",
        "key-value heads counted by a key that its family does not have",
    ),
    Kind(
        "experts",
        r"(num|n)(_local|_routed)?_experts|moe_num_experts|num_moe_experts"
        r"|ffn_config|moe_intermediate_size|moe_layers|interleave_moe_layer_step",
        "a mixture of experts",
    ),
)
# Parts of keys that Llama's layout does not have; for files of unknown families only.
_UNLIKE_LLAMA = re.compile(
    r"expert|moe|latent|lora|conv|chunk|cross|encoder|decoder_(?!start)|sparse|loop|recur|interval"
    r"|pattern|per_layer|layer_norm|layernorm_eps|norm_epsilon|expansion|parallel_(attn|residual)"
    r"|patch_size|image_size|num_channels|mel_bins|codebook|_cycles"
    r"|alibi|^n_(inner|embd|layer|head)|^d_(model|ff)|kv_channels|group_num|^ffn_"
)
# Keys about how a model was trained, not about what its layers are.
_HARMLESS = re.compile(r"router_(aux|z)_loss.*|aux_loss.*|.*_dropout|.*_pdrop|pretraining_.*")
_DEEPSEEK_KEYS = (
    "kv_lora_rank",
    "q_lora_rank",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "moe_layer_freq",
)
_LLAMA_SIGNS = (
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
)
_LLAMA_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)
_GATED_ACTIVATIONS = (None, "silu", "swish", "swiglu")
# Classes of models without a head that predicts the next token.
_HEADLESS = re.compile(
    r".*(For(MaskedLM|PreTraining|SequenceClassification|TokenClassification|QuestionAnswering"
    r"|MultipleChoice|NextSentencePrediction|ImageClassification|AudioClassification|CTC"
    r"|MaskedImageModeling|FeatureExtraction|SequenceScoring|TextEncoding|RewardModel\w*)"
    r"|EncoderModel|RewardModel|Encoder)$"
)


def refusal(values: Mapping, architectures: list[str], family: Family | None) -> str | None:
    """Returns what the file describes, with the keys that show it; None if plan can count it.

    Args:
      values: keys of the language model.
      architectures: class names of the file, from all its levels.
      family: family of the file; None for an unknown one, which may have no features but
        DeepSeek's latents and experts.
    """
    for name in architectures:
        if _HEADLESS.fullmatch(name):
            return f"a model that decodes no text (architectures: {name})"
        if name.endswith("ForConditionalGeneration") and values.get("is_encoder_decoder"):
            return f"an encoder-decoder (architectures: {name})"
    if values.get("use_bidirectional_attention") is True or values.get("is_causal") is False:
        return f"{_EITHER_WAY} ('use_bidirectional_attention' or 'is_causal')"
    if isinstance(values.get("encoder"), dict) or isinstance(values.get("decoder"), dict):
        return "an encoder-decoder ('encoder', 'decoder')"
    allowed = _allowed(values, family)
    for kind in KINDS:
        if kind.name in allowed:
            continue
        matches = [key for key in values if re.fullmatch(kind.keys, key) and _is_on(key, values)]
        if matches:
            return f"{kind.text} ({', '.join(map(repr, matches[:3]))})"
    return None


def unlike_llama(values: Mapping, latent: bool) -> str | None:
    """Returns why a file of an unknown family cannot be counted like Llama; None if it can.

    Args:
      values: keys of the language model.
      latent: whether to compare with DeepSeek-V3, which has latents and experts, instead.
    """
    if re.search(r"(^|_)encoder|_vision$|bert", str(values.get("model_type", "")).lower()):
        return "its model_type is that of an encoder"
    missing = [key for key in _LLAMA_KEYS if not isinstance(values.get(key), int)]
    if missing:
        return f"it has no number under {', '.join(map(repr, missing))}"
    if not any(values.get(key) is not None for key in _LLAMA_SIGNS):
        return "it has no key about RMS norms, rotary positions or key-value heads"
    activation = values.get("hidden_act", values.get("activation_function"))
    if activation not in _GATED_ACTIVATIONS:
        return f"its activation {activation!r} does not tell how many matrices a feed-forward has"
    for key in values:
        if _HARMLESS.fullmatch(key) or not _is_on(key, values):
            continue
        if key == "sliding_window" and values.get("use_sliding_window") is not False:
            if values.get("layer_types") is None:
                return "its 'sliding_window' does not tell which layers have a window"
        if latent and key in _DEEPSEEK_KEYS:
            continue
        if _UNLIKE_LLAMA.search(key):
            return f"its key {key!r} is not one of {'DeepSeek' if latent else 'Llama'}'s"
    return None


def is_latent(values: Mapping) -> bool:
    """Returns whether the file has every key that latent attention needs."""
    needed = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    return all(values.get(key) is not None for key in needed)


def _allowed(values: Mapping, family: Family | None) -> tuple[str, ...]:
    """Returns the names of the kinds that a file is counted with."""
    if family is None:
        return ("latent", "experts") if is_latent(values) else ()
    experts = ("experts",) if family.experts is not None else ()
    return family.kinds + experts


def _is_on(key: str, values: Mapping) -> bool:
    """Returns whether the value of a key switches on what the key names."""
    value = values[key]
    if value is None or value is False or value == 0 or value in ("", [], {}):
        return False
    if key == "attn_type_list":
        # 1 is full attention, 0 is linear attention (MiniMax).
        return not isinstance(value, list) or any(entry != 1 for entry in value)
    if key in ("num_experts", "num_local_experts", "n_routed_experts"):
        return value != 1
    return True
