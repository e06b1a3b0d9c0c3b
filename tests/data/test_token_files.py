import numpy as np
import pytest

from qkvjax.data.dataset import prepare
from qkvjax.data.token_scan import document_spans
from qkvjax.errors import UserError

SEPARATOR = 256  # of the tokenizer "bytes"
T = 8


def write(path, documents, first=True):
    """Documents behind separators, or with the first one bare, as nanoGPT's splits begin."""
    tokens = np.concatenate([[SEPARATOR, *document] for document in documents])
    tokens[0 if first else 1 :].astype("<u2").tofile(path)
    return tokens[0 if first else 1 :]


def documents(seed, count):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, rng.integers(1, 30)).tolist() for _ in range(count)]


def scored(data):
    batches = list(data.scored_batches(3))
    return np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])


def test_a_folder_keeps_its_own_split(tmp_path):
    train = write(tmp_path / "train.bin", documents(0, 30))
    held_out = documents(1, 5)
    write(tmp_path / "val.bin", held_out, first=False)
    data = prepare(f"tokens:{tmp_path}", "bytes", T)
    assert data.num_documents == 35
    rows = data.train.read(range(len(data.train)))
    np.testing.assert_array_equal(rows[:, :-1].reshape(-1), train[: len(rows) * T])
    np.testing.assert_array_equal(scored(data), sum(held_out, []))
    assert data.num_validation_tokens == len(sum(held_out, []))
    for batch in data.scored_batches(1):
        assert batch["num_bytes"].sum() == batch["weights"].sum()
    batch = data.batch(0, 0, 4, accumulation=2)
    starts = batch["inputs"] == SEPARATOR
    assert starts.any() and (batch["positions"][starts] == 0).all()


def test_a_window_reads_its_own_document(tmp_path):
    write(tmp_path / "a.bin", documents(2, 30))
    data = prepare(f"tokens:{tmp_path}/a.bin", "bytes", T, whole=True)
    batches = list(data.scored_batches(1))
    inputs = np.concatenate([batch["inputs"][batch["weights"] > 0] for batch in batches])
    expected = sum(([SEPARATOR, *document[:-1]] for document in documents(2, 30)), [])
    np.testing.assert_array_equal(inputs, expected)


def test_one_file_holds_its_last_tenth_out(tmp_path):
    tokens = write(tmp_path / "a.bin", documents(3, 40))
    data = prepare(f"tokens:{tmp_path}/a.bin", "bytes", T)
    cut = len(tokens) * 9 // 10
    tail = tokens[cut:]
    np.testing.assert_array_equal(scored(data), tail[tail != SEPARATOR])
    assert len(data.train) == (cut - 1) // T


def test_score_pads(tmp_path):
    write(tmp_path / "a.bin", documents(4, 40))
    data = prepare(f"tokens:{tmp_path}/a.bin", "bytes", T, score_pads=True)
    assert len(data.train) + len(data.validation) in (40, 41)  # one document may be cut
    assert (data.batch(0, 0, 4)["inputs"][..., 0] == SEPARATOR).all()
    assert sum(batch["weights"].sum() for batch in data.scored_batches(3)) == (
        data.num_validation_tokens
    )


def test_content_decides_the_digest(tmp_path):
    for name in ("a.bin", "b.bin"):
        write(tmp_path / name, documents(5, 30))
    a, b = (prepare(f"tokens:{tmp_path}/{name}", "bytes", T) for name in ("a.bin", "b.bin"))
    assert a.digest == b.digest
    write(tmp_path / "b.bin", documents(6, 30))
    assert prepare(f"tokens:{tmp_path}/b.bin", "bytes", T).digest != a.digest


def test_spans_leave_out_empty_documents():
    s = 9
    tokens = np.array([1, 2, s, s, 3, s, 4, 5, s], np.uint16)
    assert document_spans(tokens, s).tolist() == [[0, 2], [4, 5], [6, 8]]
    assert document_spans(tokens[:0], s).tolist() == []


def test_errors(tmp_path):
    file = tmp_path / "a.bin"
    np.array([1, 2, 300] * 9, "<u2").tofile(file)
    with pytest.raises(UserError, match="holds the id 300 and the tokenizer bytes has 257"):
        prepare(f"tokens:{file}", "bytes", 4)
    file.write_bytes(b"abc")
    with pytest.raises(UserError, match="odd number"):
        prepare(f"tokens:{file}", "bytes", 4)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        prepare(f"tokens:{file}", "bytes", 4)
    np.array([1, 2, 3] * 9, "<u2").tofile(file)
    with pytest.raises(UserError, match="train split 24 tokens.*= 65"):
        prepare(f"tokens:{file}", "bytes", 64)
    np.array([1] * 90 + [SEPARATOR] * 10, "<u2").tofile(file)
    with pytest.raises(UserError, match="validation split 0 tokens"):
        prepare(f"tokens:{file}", "bytes", 4)
    for name in ("train.bin", "val.bin"):
        np.array([1, 2, 3], "<u2").tofile(tmp_path / name)
    with pytest.raises(UserError, match="two files.*tokens:.*val.bin"):
        prepare(f"tokens:{tmp_path}", "bytes", 4, whole=True)


@pytest.fixture
def special(tmp_path):
    """Saves a byte-level tokenizer with special tokens, 256 and up, and gives its name."""
    tokenizers = pytest.importorskip("tokenizers")

    def make(*names):
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        model = tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
        bpe = tokenizers.Tokenizer(model)
        bpe.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in names])
        bpe.save(str(tmp_path / "tokenizer.json"))
        return f"bpe:{tmp_path}/tokenizer.json"

    return make


def framed(path, before, behind, count=60):
    """Documents with ids before and behind each; gives them and the number of their tokens."""
    parts = documents(7, count)
    np.concatenate([[*before, *part, *behind] for part in parts]).astype("<u2").tofile(path)
    return parts


@pytest.mark.parametrize(
    ("names", "before", "behind"),
    [
        (("<|end_of_text|>",), [], [256]),
        (
            (
                "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
                "<\uff5cend\u2581of\u2581sentence\uff5c>",
            ),
            [],
            [257],
        ),
        (("<s>", "</s>"), [256], [257]),
        (("<|bos|>", "<|user|>"), [256], []),
        (("[CLS]", "[SEP]", "[PAD]"), [256], [257, 258, 258]),
        (("<|im_start|>", "<|im_end|>"), [256], [257]),
        (("<|endoftext|>", "<|begin_of_text|>"), [257], [256]),
    ],
)
def test_documents_end_in_the_special_tokens_that_are_there(
    tmp_path, special, names, before, behind
):
    tokenizer = special(*names)
    parts = framed(tmp_path / "a.bin", before, behind)
    lines = []
    data = prepare(f"tokens:{tmp_path}/a.bin", tokenizer, T, whole=True, log=lines.append)
    assert data.num_documents == len(parts)
    np.testing.assert_array_equal(scored(data), sum(parts, []))
    for batch in data.scored_batches(3):
        assert batch["num_bytes"].sum() == batch["weights"].sum()
    name = names[(behind or before)[0] - 256]
    assert "60 documents, separators: " in lines[0] and f"60 of {name}" in lines[0]
    # In training a document starts at the separator with which `generate` begins as well.
    train = prepare(f"tokens:{tmp_path}/a.bin", tokenizer, T)
    batch = train.batch(0, 0, 40)
    starts = batch["inputs"] == train.tokenizer.separator
    assert starts.any() and (batch["positions"][starts] == 0).all()


def test_special_tokens_inside_documents_are_not_scored(tmp_path, special):
    tokenizer = special("<|endoftext|>", "<|user|>")
    parts = framed(tmp_path / "a.bin", [257], [256])
    lines = []
    data = prepare(f"tokens:{tmp_path}/a.bin", tokenizer, T, whole=True, log=lines.append)
    assert data.num_documents == 60
    assert data.num_validation_tokens == len(sum(parts, []))
    np.testing.assert_array_equal(scored(data), sum(parts, []))
    assert "inside documents, trained on and not scored: 60 of <|user|>" in lines[0]
    batch = prepare(f"tokens:{tmp_path}/a.bin", tokenizer, T).batch(0, 0, 40)
    assert (batch["inputs"] == 257).any()


def test_files_without_a_separator_are_logged(tmp_path):
    np.array([1, 2, 3] * 99, "<u2").tofile(tmp_path / "a.bin")
    lines = []
    data = prepare(f"tokens:{tmp_path}/a.bin", "bytes", T, log=lines.append)
    assert data.num_documents == 2
    assert "1 file, 297 ids of uint16, 2 documents, separators: none was found" in lines[0]


def test_ids_that_stand_for_no_bytes_are_refused(tmp_path, special):
    """As most of a SentencePiece vocabulary would, whose bits per byte could not be counted."""
    tokenizer = special("<|end_of_text|>")
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"A":', '"\u2581A":'))
    parts = [*documents(8, 60), [32]]
    np.concatenate([[*part, 256] for part in parts]).astype("<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(
        UserError, match="which stands for no bytes in the tokenizer bpe.*byte-level"
    ):
        prepare(f"tokens:{tmp_path}/a.bin", tokenizer, T)


def test_shards_are_one_stream(tmp_path):
    tokens = write(tmp_path / "all.bin", documents(9, 60))
    (tmp_path / "shards").mkdir()
    for i, part in enumerate(np.array_split(tokens, 7)):
        part.astype("<u2").tofile(tmp_path / "shards" / f"{i}.bin")
    whole = prepare(f"tokens:{tmp_path}/all.bin", "bytes", T)
    for source in (f"tokens:{tmp_path}/shards", f"tokens:{tmp_path}/shards/*"):
        lines = []
        data = prepare(source, "bytes", T, log=lines.append)
        assert data.digest == whole.digest and "7 files, 61 documents" in lines[-1]
        for a, b in ((data.train, whole.train), (data.validation, whole.validation)):
            np.testing.assert_array_equal(a.read(range(len(a))), b.read(range(len(b))))


def test_plain_ids_keep_the_digest_of_older_versions(tmp_path):
    ids = np.arange(5000) % 256
    ids[::37] = SEPARATOR
    ids.astype("<u2").tofile(tmp_path / "a.bin")
    digest = "b270be7e6914d7be7a5cebc7377f08fcdcdba5cbda5aca91a229755aeb380f12"
    assert prepare(f"tokens:{tmp_path}/a.bin", "bytes", 8).digest == digest


def test_numbers_of_characters_are_not_read_as_bytes(tmp_path):
    for name in ("train.bin", "val.bin"):
        np.random.default_rng(0).integers(0, 65, 999).astype("<u2").tofile(tmp_path / name)
    (tmp_path / "meta.pkl").write_bytes(b"\x80\4}.")
    for source in (f"tokens:{tmp_path}", f"tokens:{tmp_path}/train.bin"):
        with pytest.raises(
            UserError, match="characters that meta.pkl .* never opened: use .*text:PATH"
        ):
            prepare(source, "bytes", T)
    (tmp_path / "input.txt").write_text("text")
    with pytest.raises(UserError, match="use data.source=text:.*input.txt"):
        prepare(f"tokens:{tmp_path}", "bytes", T)
