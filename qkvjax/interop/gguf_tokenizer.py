"""The tokenizer of a GGUF file as the content of a tokenizer.json."""

from __future__ import annotations

from qkvjax.errors import UserError
from qkvjax.interop.gguf_file import GgufFile

# How a byte-level BPE splits a text before it merges, as tokenizer.json writes it.
_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_DIGITS = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZERS = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _BYTE_LEVEL]},
}
# Values of `tokenizer.ggml.token_type`.
_NORMAL = 1
_CONTROL = 3
_USER_DEFINED = 4


def tokenizer_json(file: GgufFile) -> dict:
    """Returns the content of a tokenizer.json.

    Raises:
      UserError: the tokenizer is not a byte-level BPE with a known pre-tokenizer.
    """
    pre_tokenizer = _pre_tokenizer(file)
    tokens = file.values["tokenizer.ggml.tokens"]
    types = file.values.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    return {
        "version": "1.0",
        "added_tokens": _added_tokens(tokens, types),
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": file.values["tokenizer.ggml.merges"],
        },
    }


def _pre_tokenizer(file: GgufFile) -> dict:
    """Returns the pre-tokenizer of a byte-level BPE; raises UserError for other tokenizers."""
    kind = file.values.get("tokenizer.ggml.model")
    if kind in ("llama", "t5"):
        raise UserError(
            f"{file.path} has a tokenizer of kind {kind!r}, which is SentencePiece, as Llama 2,"
            " TinyLlama and Mistral have: bits per byte need a byte-level BPE, so convert import"
            " reads models with one, as SmolLM and SmolLM2 are"
        )
    name = file.values.get("tokenizer.ggml.pre")
    if name in (None, "default"):
        name = "gpt-2"
    if kind != "gpt2" or name not in PRE_TOKENIZERS:
        raise UserError(
            f"{file.path} has a tokenizer of kind {kind!r} with the pre-tokenizer {name!r}: convert"
            " import reads byte-level BPE ('gpt2') with the pre-tokenizer"
            f" {' or '.join(map(repr, PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]


def _added_tokens(tokens: list[str], types: list[int]) -> list[dict]:
    """Returns the tokens that are matched in a text before it is split."""
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
