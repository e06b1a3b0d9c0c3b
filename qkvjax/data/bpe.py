"""Byte-level BPE: the files of its vocabulary, the bytes of each id, and encoding."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from qkvjax.data import words
from qkvjax.data.unencodable import Unencodable
from qkvjax.errors import UserError
from qkvjax.files import read_object

# The separator is the first of these that a tokenizer.json has.
SEPARATORS = ("<|endoftext|>", "</s>", "<eos>")
_MAX_IDS = 10**8
_TEXTS_PER_CALL = 10_000  # given to the library at once


class BpeEncoder:
    """Maps UTF-8 bytes to ids with the library `tokenizers`, word by word where that is exact.

    Args:
      library: a `tokenizers.Tokenizer`.
      table: the bytes of each id.
    """

    def __init__(self, library, table: tuple[bytes, ...]):
        self._library = library
        self._table = table
        description = json.loads(library.to_str())
        self._added_texts = words.added_texts(description)
        expression = words.word_expression(description)
        self.by_word = None
        if expression is not None:
            self.by_word = words.WordEncoder(expression, self._encode_texts)

    def __call__(self, document: bytes) -> np.ndarray:
        """Returns the ids of a document, int32 [n].

        Raises:
          Unencodable: the document is not UTF-8, or its ids do not stand for the same bytes.
        """
        try:
            text = document.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Unencodable(error.reason, error.start) from None
        # The library looks for added tokens before it cuts a text into words.
        if self.by_word is None or any(added in text for added in self._added_texts):
            return np.array(self._encode_texts([text])[0], np.int32)
        return self.by_word(text)

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        encoded = []
        for start in range(0, len(texts), _TEXTS_PER_CALL):
            batch = texts[start : start + _TEXTS_PER_CALL]
            results = self._library.encode_batch_fast(batch, add_special_tokens=False)
            encoded += [result.ids for result in results]
        for text, ids in zip(texts, encoded, strict=True):
            if b"".join([self._table[i] for i in ids]) != text.encode():
                raise Unencodable("", 0)
        return encoded


def read_tokenizer_json(path: Path) -> tuple[tuple[bytes, ...], int]:
    """Reads (the bytes of each id, separator) from a tokenizer.json.

    The separator is one more id if the file names none.

    Raises:
      UserError: the file holds no BPE vocabulary.
    """
    content = read_object(path)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):
        raise UserError(
            f"{path} holds no BPE vocabulary: use the tokenizer.json of a byte-level BPE"
        )
    added = content.get("added_tokens") or ()
    try:
        ids = vocabulary | {token["content"]: token["id"] for token in added}
        num_ids = max((int(i) for i in ids.values()), default=-1) + 1
    except (TypeError, KeyError, ValueError) as error:
        raise _no_vocabulary(path, error) from None
    if num_ids > _MAX_IDS:
        raise UserError(f"{path} holds the id {num_ids - 1:,}, which no tokenizer has")
    separator = next((ids[token] for token in SEPARATORS if token in ids), num_ids)
    num_ids = max(num_ids, separator + 1)
    return bytes_of_ids(path, vocabulary, added, num_ids, separator), separator


def gpt2_files(path: Path) -> list[Path]:
    """Finds the vocabulary and the merges of GPT-2, under OpenAI's or Hugging Face's names.

    Args:
      path: their folder, or a file in it.

    Raises:
      UserError: one of them is missing.
    """
    folder = path if path.is_dir() else path.parent
    files = []
    for names in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        candidates = [folder / name for name in names if (folder / name).is_file()]
        if not candidates:
            raise UserError(
                f"data.tokenizer=gpt2:{path}: {folder.absolute()} has no {' or '.join(names)};"
                " gpt2: takes a folder with GPT-2's encoder.json and vocab.bpe"
            )
        files.append(candidates[0])
    return files


def bytes_of_ids(
    path: Path,
    vocabulary: Mapping[str, int],
    added: Iterable[Mapping],
    num_ids: int,
    separator: int,
) -> tuple[bytes, ...]:
    """Returns the bytes of each id; b"" for special ids, and for tokens that are not byte-level.

    Args:
      path: of the vocabulary, for messages.
      vocabulary: token, written in the characters of byte-level BPE -> id.
      added: added tokens as a tokenizer.json lists them, written as plain text.
    """
    byte_of = byte_of_character()
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


def byte_of_character() -> dict[str, int]:
    """Returns printable character -> the byte that byte-level BPE writes as this character.

    Source: GPT-2's encoder.py, `bytes_to_unicode`.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [i for i in range(256) if i not in printable]
    mapping = {chr(i): i for i in printable}
    return mapping | {chr(256 + n): i for n, i in enumerate(others)}


def _no_vocabulary(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} holds no vocabulary of tokens and ids ({type(error).__name__}: {error}): copy it"
        " again"
    )
