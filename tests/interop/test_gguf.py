"""GGUF files: the model that is read is the one that the file's own conventions describe."""

import importlib.util
import shutil

import numpy as np
import pytest
from gguf_file import BASE, EPSILON, HEADS, KV_HEADS, LAYERS, SHAPES, WIDTH, tokens, write

from qkvjax.commands.convert import main
from qkvjax.data.tokenizers import load_tokenizer
from qkvjax.errors import UserError
from qkvjax.interop.gguf import read
from qkvjax.training.restore import load_arrays, load_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="needs the extra qkvjax[gguf]"
)


def forward(arrays, ids):
    """Logits [T, V] in float64 by llama.cpp's conventions: neighbours are rotated."""

    def norm(x, gain):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPSILON) * gain

    def rotate(x):  # [T, n, H]
        angles = np.arange(len(x))[:, None] * BASE ** (-np.arange(0, WIDTH, 2) / WIDTH)
        rotated = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
        return np.stack([rotated.real, rotated.imag], axis=-1).reshape(x.shape)

    t = {name: array.astype(np.float64) for name, array in arrays.items()}
    x = t["token_embd"][ids]
    for i in range(LAYERS):
        w = {name: t[f"blk.{i}.{name}"] for name in SHAPES}
        h = norm(x, w["attn_norm"])
        q, k, v = ((h @ w[f"attn_{role}"].T).reshape(len(ids), -1, WIDTH) for role in "qkv")
        q = rotate(q)
        k = np.repeat(rotate(k), HEADS // KV_HEADS, axis=1)
        scores = np.einsum("tnh,snh->nts", q, k) / WIDTH**0.5
        scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("nts,snh->tnh", weights, np.repeat(v, HEADS // KV_HEADS, axis=1))
        x = x + mixed.reshape(len(ids), -1) @ w["attn_output"].T
        h = norm(x, w["ffn_norm"])
        gate = h @ w["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
    return norm(x, t["output_norm"]) @ t.get("output", t["token_embd"]).T


@pytest.mark.parametrize("tied", [True, False])
def test_import_is_the_model_of_the_file(tmp_path, tied, capsys):
    arrays = write(tmp_path / "a.gguf", tied)
    argv = ["convert", "import", f"--source={tmp_path / 'a.gguf'}", f"--workdir={tmp_path / 'run'}"]
    assert main(argv) == 0
    assert "F32, Q8_0" in capsys.readouterr().out
    model, tokenizer, config, step = load_model(tmp_path / "run")
    assert step == 0 and config.data.seq_len == 48
    ids = np.random.default_rng(1).integers(0, len(tokens()), 20)
    expected = forward(arrays, ids)
    logits = model(ids[None])[0, :, : len(tokens())]
    np.testing.assert_allclose(logits, expected, atol=1e-5 * abs(expected).max())
    assert main(argv) == 2 and "holds a model already" in capsys.readouterr().err


def test_the_tokenizer_comes_along(tmp_path):
    write(tmp_path / "a.gguf")
    main(["convert", "import", f"--source={tmp_path}/a.gguf", f"--workdir={tmp_path}/run"])
    tokenizer = load_tokenizer(f"bpe:{tmp_path}/run/tokenizer.json")
    assert tokenizer.separator == tokens().index("<|endoftext|>")
    ids = tokenizer.encode("in the 12<|endoftext|>é")
    assert tokenizer.decode(ids) == "in the 12<|endoftext|>é" and tokenizer.separator not in ids
    assert tokens().index("Ġthe") in ids and len(ids) == 2 + 1 + 1 + 2 + 13 + 2


def test_an_imported_workdir_can_be_moved(tmp_path):
    """With its own tokenizer, also one that an earlier version made; and so can a tied copy."""
    write(tmp_path / "a.gguf")
    main(["convert", "import", f"--source={tmp_path}/a.gguf", f"--workdir={tmp_path}/run"])
    argv = ["convert", "tie", f"--workdir={tmp_path}/run", f"--output={tmp_path}/tied"]
    assert main([*argv, "--sharing=q-k=v"]) == 0
    for name in ("run", "tied"):
        moved = shutil.move(tmp_path / name, tmp_path / f"{name}-moved")
        _, tokenizer, config, _ = load_model(moved)
        assert tokenizer.num_ids == len(tokens())
        assert config.data.tokenizer == f"bpe:{moved}/tokenizer.json"
    (tmp_path / "run-moved" / "tokenizer_copy.json").unlink()
    assert load_model(tmp_path / "run-moved")[1].num_ids == len(tokens())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gemma"}, "architecture 'gemma'.*reads 'llama'"),
        ({"without": ["blk.1.ffn_up"]}, r"no tensor blk\.1\.ffn_up\.weight"),
        ({"extra": ["rope_freqs"]}, r"does not have, the first 'rope_freqs\.weight'"),
        ({"llama__rope__scaling__type": "yarn"}, r"rope\.scaling\.type='yarn'"),
        ({"tokenizer": "llama"}, "tokenizer of kind 'llama', which is SentencePiece.*as SmolLM"),
        ({"tokenizer": "bert"}, "tokenizer of kind 'bert'"),
    ],
)
def test_files_that_ours_is_not_equal_to(tmp_path, options, message):
    write(tmp_path / "a.gguf", **options)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.gguf")


def test_damaged_files(tmp_path, capsys):
    write(tmp_path / "a.gguf")
    whole = (tmp_path / "a.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    lengths = [0, 3, 20, 200, len(whole) // 2, len(whole) - 300]
    for content in (*(whole[:n] for n in lengths), b"PK\3\4" + whole[4:]):
        cut.write_bytes(content)
        argv = ["convert", "import", f"--source={cut}", f"--workdir={tmp_path / 'run'}"]
        assert main(argv) == 2
        assert "damaged, truncated or not a GGUF file" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()
    assert main(["convert", "import", "--source=nothing.gguf", f"--workdir={tmp_path}/r"]) == 2
    assert "there is no file nothing.gguf" in capsys.readouterr().err


def test_a_message_recommends_nothing_that_is_refused(tmp_path):
    write(tmp_path / "a.gguf", architecture="gemma")
    with pytest.raises(UserError) as refused:
        read(tmp_path / "a.gguf")
    assert "Llama 2" not in str(refused.value) and "TinyLlama" not in str(refused.value)


def test_shards_are_to_be_merged(tmp_path):
    import gguf

    path = tmp_path / "model-00002-of-00003.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"shard 2 of 3.*gguf-split --merge .* model\.gguf"):
        read(path)


@pytest.mark.parametrize(
    ("number", "message"),
    [(999, "is newer than the installed gguf.*999.*pip install --upgrade gguf"), (9, "Q8_1")],
)
def test_a_quantisation_that_the_library_does_not_know(tmp_path, number, message):
    path = tmp_path / "a.gguf"
    write(path)
    content = bytearray(path.read_bytes())
    at = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8
    content[at : at + 4] = number.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        read(path)
    assert "copy it again" not in str(refused.value)


def test_another_format_is_named(tmp_path):
    path = tmp_path / "a.gguf"
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match="not a GGUF file.*it is a safetensors file"):
        read(path)


def test_tied_copies(tmp_path, capsys):
    """K = V by average, decoded through a cache of one tensor."""
    from qkvjax.commands.cli import main as command_line

    write(tmp_path / "a.gguf")
    run = tmp_path / "run"
    tied = tmp_path / "tied"
    main(["convert", "import", f"--source={tmp_path / 'a.gguf'}", f"--workdir={run}"])
    argv = ["convert", "tie", f"--workdir={run}", f"--output={tied}"]
    assert main([*argv, "--sharing=q-k=v"]) == 0
    assert "nothing was trained" in capsys.readouterr().out
    before = load_arrays(run)[0]
    after = load_arrays(tied)[0]
    name = "model.stack.blocks.0.attention.projections.{}.weight"
    mean = (before[name.format("k")] + before[name.format("v")]) / 2
    np.testing.assert_allclose(after[name.format("kv")], mean, rtol=1e-6)
    for same in before.keys() & after.keys():
        np.testing.assert_array_equal(before[same], after[same])
    generate = ["generate", f"--workdir={run}", f"--workdir={tied}", "--prompt=the"]
    assert command_line(["qkvjax", *generate, "--max_tokens=4", "--cache_dtype=bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert f"tokens x {LAYERS * 2 * KV_HEADS * WIDTH * 2}" in printed
    assert f"tokens x {LAYERS * KV_HEADS * WIDTH * 2}" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "tie needs --workdir=DIR, --output=DIR and --sharing"),
        (["--sharing=k=v"], "partition of q, k and v"),
        (["--sharing=q-k=v", "--method=heal"], "'heal' is unknown: use average"),
        (["--sharing=q=k=v"], "num_kv_heads=2 must equal num_heads=4"),
    ],
)
def test_ties_that_cannot_be(tmp_path, capsys, flags, message):
    write(tmp_path / "a.gguf")
    main(["convert", "import", f"--source={tmp_path / 'a.gguf'}", f"--workdir={tmp_path / 'run'}"])
    where = [f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'tied'}"]
    assert main(["convert", "tie", *where, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tied").exists()


def test_what_should_be_converted(capsys):
    for argv in (["convert"], ["convert", "export"], ["convert", "import"]):
        assert main(argv) == 2
    err = capsys.readouterr().err
    assert "not convert export" in err and "--source=FILE is missing" in err
