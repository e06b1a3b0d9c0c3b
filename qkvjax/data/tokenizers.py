"""Tokenizers: bytes, GPT-2's, and any byte-level BPE in a tokenizer.json.

All of them keep every byte of a document, which is what lets bits per byte be exact and
comparable: each id stands for a known string of bytes. Long documents are encoded in pieces where
the ids of the pieces are the ids of the whole (`qkvjax.data.words`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from qkvjax.data import words
from qkvjax.data.bpe import SEPARATORS, _Bpe, _gpt2_files, _read_tokenizer_json, _table
from qkvjax.data.files import expanded
from qkvjax.data.unencodable import Unfit
from qkvjax.errors import UserError, did_you_mean
from qkvjax.files import read_object

KINDS = ("bytes", "bpe", "gpt2")
GPT2_SEPARATOR, GPT2_IDS = 50256, 50257
_PIECE = 1 << 20  # bytes of a long document that are encoded at once


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Bytes to ids and back.

    Attributes:
      name: the kind, "bytes", "bpe" or "gpt2".
      separator: the id that stands before each document.
      table: the bytes of each id; b"" for the separator and other special ids.
      fingerprint: tells tokenizers apart, whatever their paths.
      special: the names of ids that stand for no text, which token files may have.
      spec: `data.tokenizer`, which loads the same tokenizer in another process.
      cuts: where a long document may be cut: "anywhere", between "words", or "nowhere".
    """

    name: str
    separator: int
    table: tuple[bytes, ...]
    fingerprint: str
    _encode: Callable[[bytes], np.ndarray] = dataclasses.field(repr=False)
    special: Mapping[int, str] = dataclasses.field(default_factory=dict, repr=False)
    spec: str = "bytes"
    cuts: str = "anywhere"

    @property
    def num_ids(self) -> int:
        """Ids in all, the separator included."""
        return len(self.table)

    @functools.cached_property
    def num_bytes(self) -> np.ndarray:
        """int32 [num_ids]: bytes of the document that each id stands for."""
        return np.array([len(token) for token in self.table], np.int32)

    def encode(self, document: bytes | str) -> np.ndarray:
        """The ids of a document, int32 [n], without a separator; a str is taken as UTF-8.

        Raises:
          UserError: a BPE tokenizer and bytes that are not UTF-8, or a tokenizer that loses
            some of them.
        """
        if isinstance(document, str):
            document = document.encode()
        found = []
        at = 0
        for piece in self.pieces(document):
            try:
                found.append(self.encode_piece(piece))
            except Unfit as why:
                where = f"the document that starts with {document[:40]!r}"
                raise Unfit(why.reason, at + why.at).refusal(self.spec, where) from None
            at += len(piece)
        return np.concatenate(found) if found else np.empty(0, np.int32)

    def encode_piece(self, piece: bytes) -> np.ndarray:
        """The ids of one of `pieces`, int32 [n].

        Raises:
          Unfit: as `encode`, for the caller to name the document.
        """
        return self._encode(piece)

    def pieces(self, document: bytes) -> Iterator[bytes]:
        """A document in parts of about 1 MB whose ids, one after the other, are its ids."""
        start = 0
        while start < len(document):
            end = self._cut(document, start) if len(document) - start > _PIECE else len(document)
            yield document[start:end]
            start = end

    def _cut(self, document, start):
        """Where the piece that begins at `start` ends."""
        if self.cuts == "nowhere":
            return len(document)
        if self.cuts == "anywhere":
            return start + _PIECE
        for end in range(start + _PIECE, len(document), _PIECE):
            try:
                cut = words.safe_cut(document, start, end)
            except UnicodeDecodeError:
                break  # `encode_piece` says where
            if cut is not None and cut > start:
                return cut
        return len(document)

    def bytes_of(self, ids: np.ndarray) -> bytes:
        """The bytes that ids stand for, one after the other."""
        joined, starts = self._joined
        ids = np.asarray(ids, np.int64)
        return words.gather(joined, starts[ids], self.num_bytes[ids].astype(np.int64)).tobytes()

    @functools.cached_property
    def _joined(self):
        """uint8, the bytes of all ids; int64 [num_ids], where those of each begin."""
        ends = np.cumsum(self.num_bytes, dtype=np.int64)
        return np.frombuffer(b"".join(self.table), np.uint8), ends - self.num_bytes

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; separators are left out, bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.table[int(i)] for i in ids).decode("utf-8", errors="replace")


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: bytes, bpe:PATH or gpt2:PATH."""
    kind, path = _parse(name)
    if kind == "bytes":
        table = (*(bytes([i]) for i in range(256)), b"")
        return Tokenizer("bytes", 256, table, "bytes", _encode_bytes)
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            f"data.tokenizer={name!r} needs an extra package: pip install qkvjax[bpe]"
            " (or use --config.data.tokenizer=bytes)"
        ) from None
    if kind == "gpt2":
        files = encoder, merges = _gpt2_files(path)
        vocabulary = read_object(encoder)
        if len(vocabulary) != GPT2_IDS:
            raise UserError(
                f"{encoder} is no vocabulary of GPT-2's {GPT2_IDS:,} ids: save another tokenizer as"
                " a tokenizer.json and use bpe:PATH"
            )
        separator = GPT2_SEPARATOR
        table = _table(encoder, vocabulary, (), GPT2_IDS, separator)
    else:
        files = (path,)
        table, separator = _read_tokenizer_json(path)
    try:
        if kind == "gpt2":
            bpe = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(encoder), str(merges)))
            bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        else:
            bpe = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  (the library raises nothing narrower)
        raise UserError(
            f"{path} is no tokenizer that tokenizers {tokenizers.__version__} can read ({error}):"
            " copy it again, or save it with that version"
        ) from None
    bpe.no_truncation()
    bpe.no_padding()
    # A document that spells a special token means its characters.
    bpe.encode_special_tokens = True
    if kind == "gpt2":
        special = {GPT2_SEPARATOR: SEPARATORS[0]}
    else:
        added = bpe.get_added_tokens_decoder().items()
        special = {i: token.content for i, token in added if token.special}
    encode = _Bpe(bpe, table)
    cuts = "nowhere" if encode.by_word is None else "words"
    return Tokenizer(kind, separator, table, _digest(files), encode, special, name, cuts)


def tokenizer_files(name: str) -> tuple[Path, ...]:
    """Returns the files that `data.tokenizer` reads, in the order of its fingerprint.

    Raises:
      UserError: `name` is not a tokenizer, or one of its files is missing.
    """
    kind, path = _parse(name)
    if kind == "bytes":
        return ()
    files = (path,) if kind == "bpe" else tuple(_gpt2_files(path))
    for file in files:
        if not file.is_file():
            raise UserError(f"data.tokenizer={name!r}: there is no file {file}: check the path")
    return files


def tokenizer_fingerprint(name: str) -> str:
    """Returns what `Tokenizer.fingerprint` is for `data.tokenizer`, without loading it."""
    files = tokenizer_files(name)
    return _digest(files) if files else "bytes"


def _digest(files: Iterable[Path]) -> str:
    digests = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
    return hashlib.sha256(digests).hexdigest()


def tokenizer_size(name: str) -> int:
    """Number of ids of `data.tokenizer`, without any library; GPT-2's files may be absent."""
    kind, path = _parse(name)
    if kind == "bpe":
        return len(_read_tokenizer_json(path)[0])
    return 257 if kind == "bytes" else GPT2_IDS


def _parse(name):
    kind, _, path = name.partition(":")
    if kind not in KINDS:
        near = did_you_mean(kind, KINDS)
        raise UserError(f"data.tokenizer={name!r} is none of bytes, bpe:PATH, gpt2:PATH{near}")
    if (kind == "bytes") == bool(path):
        what = "bytes alone" if kind == "bytes" else f"{kind}:PATH"
        raise UserError(f"data.tokenizer={name!r}: write {what}")
    return kind, expanded(path)


def _encode_bytes(document):
    return np.frombuffer(document, np.uint8).astype(np.int32)
