"""Byte-level BPE: the files of its vocabulary, the bytes of each id, and encoding."""

from __future__ import annotations

import json

import numpy as np

from qkvjax.data import words
from qkvjax.data.unencodable import Unfit
from qkvjax.errors import UserError
from qkvjax.files import read_object

_MOST_IDS = 10**8
_WORDS = 10_000  # given to the library at once
# Looked for in a tokenizer.json, in this order.
SEPARATORS = ("<|endoftext|>", "</s>", "<eos>")


class _Bpe:
    """Bytes -> ids by the library `tokenizers`, word by word where that is exact."""

    def __init__(self, library, table):
        self._library = library
        self._table = table
        description = json.loads(library.to_str())
        self._whole = words.added_texts(description)
        expression = words.word_expression(description)
        self.by_word = expression and words.WordEncoder(expression, self._encode_texts)

    def __call__(self, document: bytes) -> np.ndarray:
        try:
            text = document.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Unfit(error.reason, error.start) from None
        if self.by_word is None or any(added in text for added in self._whole):
            return np.array(self._encode_texts([text])[0], np.int32)
        return self.by_word(text)

    def _encode_texts(self, texts):
        encoded = []
        for start in range(0, len(texts), _WORDS):
            some = texts[start : start + _WORDS]
            found = self._library.encode_batch_fast(some, add_special_tokens=False)
            encoded += [one.ids for one in found]
        for text, ids in zip(texts, encoded, strict=True):
            if b"".join([self._table[i] for i in ids]) != text.encode():
                raise Unfit("", 0)
        return encoded


def _table(path, vocabulary, added, num_ids, separator):
    """The bytes of each id: byte-level characters, or the text of an added token."""
    byte_of = _byte_of_character()
    table = [b""] * num_ids
    try:
        for token, i in vocabulary.items():
            if all(character in byte_of for character in token):
                table[i] = bytes(byte_of[character] for character in token)
        for token in added:
            table[token["id"]] = b"" if token.get("special") else token["content"].encode()
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise _no_vocabulary(path, error) from None
    table[separator] = b""
    return tuple(table)


def _no_vocabulary(path, error):
    return UserError(
        f"{path} holds no vocabulary of tokens and ids ({type(error).__name__}: {error}): copy it"
        " again"
    )


def _byte_of_character():
    """The printable characters that byte-level BPE writes for bytes (GPT-2's encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [i for i in range(256) if i not in printable]
    mapping = {chr(i): i for i in printable}
    return mapping | {chr(256 + n): i for n, i in enumerate(others)}


def _gpt2_files(path):
    folder = path if path.is_dir() else path.parent
    found = []
    for names in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        paths = [folder / name for name in names if (folder / name).is_file()]
        if not paths:
            raise UserError(
                f"data.tokenizer=gpt2:{path}: {folder.absolute()} has no {' or '.join(names)};"
                " gpt2: takes a folder with GPT-2's encoder.json and vocab.bpe"
            )
        found.append(paths[0])
    return found


def _read_tokenizer_json(path):
    """(table, separator) of a tokenizer.json; the separator is one more id where it names none."""
    content = read_object(path)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):
        use = "use the tokenizer.json of a byte-level BPE"
        raise UserError(f"{path} holds no BPE vocabulary: {use}")
    added = content.get("added_tokens") or ()
    try:
        ids = vocabulary | {token["content"]: token["id"] for token in added}
        num_ids = max((int(i) for i in ids.values()), default=-1) + 1
    except (TypeError, KeyError, ValueError) as error:
        raise _no_vocabulary(path, error) from None
    if num_ids > _MOST_IDS:
        raise UserError(f"{path} holds an id of {num_ids - 1:,}, which no tokenizer has")
    separator = next((ids[token] for token in SEPARATORS if token in ids), num_ids)
    return _table(path, vocabulary, added, max(num_ids, separator + 1), separator), separator
