"""A small random model as a GGUF file, for tests."""

import numpy as np

LAYERS, D, HEADS, KV_HEADS, WIDTH, INNER, EPSILON, BASE = 2, 64, 4, 2, 16, 96, 1e-3, 5000.0
SHAPES = {
    "attn_q": (HEADS * WIDTH, D),
    "attn_k": (KV_HEADS * WIDTH, D),
    "attn_v": (KV_HEADS * WIDTH, D),
    "attn_output": (D, HEADS * WIDTH),
    "ffn_gate": (INNER, D),
    "ffn_up": (INNER, D),
    "ffn_down": (D, INNER),
    "attn_norm": (D,),
    "ffn_norm": (D,),
}


def tokens():
    from qkvjax.data.bpe import byte_of_character

    return [*byte_of_character(), "Ġt", "he", "Ġthe", "<|endoftext|>"]


def write(path, tied=True, architecture="llama", without=(), extra=(), **keys):
    """A small random model; returns its tensors, as the file's reader will see them."""
    import gguf

    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)  # noqa: E731
    names = {f"blk.{i}.{n}": s for i in range(LAYERS) for n, s in SHAPES.items()}
    names |= {"token_embd": (len(tokens()), D), "output_norm": (D,)}
    names |= {} if tied else {"output": (len(tokens()), D)}
    names |= dict.fromkeys(extra, (D,))
    arrays = {n: 1 + 0.1 * draw(*s) if len(s) == 1 else draw(*s) for n, s in names.items()}
    arrays["token_embd"] *= 0.1  # so small that the norms' epsilon matters
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(48)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_freq_base(BASE)
    writer.add_tokenizer_model(keys.pop("tokenizer", "gpt2"))
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens())
    writer.add_token_types([1] * (len(tokens()) - 1) + [3])
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    for name, value in keys.items():
        writer.add_string(name.replace("__", "."), value)
    eight = gguf.GGMLQuantizationType.Q8_0
    for name, array in arrays.items():
        if name in without:
            continue
        if name.endswith("ffn_up"):  # in blocks of eight bits
            packed = gguf.quantize(array, eight)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=eight)
            arrays[name] = gguf.dequantize(packed, eight)
        else:
            writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays
