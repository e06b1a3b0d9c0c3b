"""Tokenizers: bytes, GPT-2's, and any byte-level BPE in a tokenizer.json.

All of them keep every byte of a document: each id stands for a known string of bytes. So bits per
byte are exact, and comparable between tokenizers. Long documents are encoded in pieces whose ids
together are the ids of the whole (`qkvjax.data.words`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from qkvjax.data import words
from qkvjax.data.bpe import (
    SEPARATORS,
    BpeEncoder,
    bytes_of_ids,
    gpt2_files,
    read_tokenizer_json,
)
from qkvjax.data.files import expanded
from qkvjax.data.unencodable import Unencodable
from qkvjax.errors import UserError, did_you_mean
from qkvjax.files import read_object

KINDS = ("bytes", "bpe", "gpt2")
GPT2_SEPARATOR = 50256
GPT2_IDS = 50257
_BYTES_SEPARATOR = 256  # the ids before it are the 256 bytes
_PIECE_BYTES = 1 << 20  # of a long document that are encoded at once


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Maps bytes to ids, and ids to bytes.

    Attributes:
      name: the kind, "bytes", "bpe" or "gpt2".
      separator: the id that stands before each document.
      table: the bytes of each id; b"" for the separator and other special ids.
      fingerprint: the same for tokenizers with the same files, whatever their paths.
      special: id -> name of the tokens that stand for no text, which token files may have.
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
        """Number of ids, with the separator."""
        return len(self.table)

    @functools.cached_property
    def num_bytes(self) -> np.ndarray:
        """int32 [num_ids], the number of bytes that each id stands for."""
        return np.array([len(token) for token in self.table], np.int32)

    def encode(self, document: bytes | str) -> np.ndarray:
        """Returns the ids of a document, int32 [n], without a separator.

        Args:
          document: bytes, or a text that is encoded as UTF-8.

        Raises:
          UserError: a BPE tokenizer got bytes that are not UTF-8, or loses some of them.
        """
        if isinstance(document, str):
            document = document.encode()
        encoded = []
        start = 0
        for piece in self.pieces(document):
            try:
                encoded.append(self.encode_piece(piece))
            except Unencodable as error:
                name = f"the document that starts with {document[:40]!r}"
                in_document = Unencodable(error.reason, start + error.position)
                raise in_document.as_user_error(self.spec, name) from None
            start += len(piece)
        return np.concatenate(encoded) if encoded else np.empty(0, np.int32)

    def encode_piece(self, piece: bytes) -> np.ndarray:
        """Returns the ids of one of `pieces`, int32 [n].

        Raises:
          Unencodable: as `encode`; the caller knows the name of the document.
        """
        return self._encode(piece)

    def pieces(self, document: bytes) -> Iterator[bytes]:
        """Yields a document in pieces of about 1 MB, whose ids together are its ids."""
        start = 0
        while start < len(document):
            end = self._piece_end(document, start)
            yield document[start:end]
            start = end

    def _piece_end(self, document: bytes, start: int) -> int:
        """Returns the end of the piece that begins at `start`."""
        if len(document) - start <= _PIECE_BYTES or self.cuts == "nowhere":
            return len(document)
        if self.cuts == "anywhere":
            return start + _PIECE_BYTES
        for end in range(start + _PIECE_BYTES, len(document), _PIECE_BYTES):
            try:
                cut = words.safe_cut(document, start, end)
            except UnicodeDecodeError:
                break  # `encode_piece` raises for the piece
            if cut is not None and cut > start:
                return cut
        return len(document)

    def bytes_of(self, ids: np.ndarray) -> bytes:
        """Returns the bytes that ids stand for, one after the other."""
        joined, starts = self._joined_table
        ids = np.asarray(ids, np.int64)
        return words.gather(joined, starts[ids], self.num_bytes[ids].astype(np.int64)).tobytes()

    @functools.cached_property
    def _joined_table(self) -> tuple[np.ndarray, np.ndarray]:
        """(the bytes of all ids, uint8 [n]; where those of each id begin, int64 [num_ids])."""
        ends = np.cumsum(self.num_bytes, dtype=np.int64)
        return np.frombuffer(b"".join(self.table), np.uint8), ends - self.num_bytes

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, without separators; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.table[int(i)] for i in ids).decode("utf-8", errors="replace")


def load_tokenizer(name: str) -> Tokenizer:
    """Loads the tokenizer that `data.tokenizer` names: bytes, bpe:PATH or gpt2:PATH.

    Raises:
      UserError: an unknown name, a missing or damaged file, or a missing library.
    """
    kind, path = _parse(name)
    if kind == "bytes":
        table = (*(bytes([i]) for i in range(256)), b"")
        return Tokenizer("bytes", _BYTES_SEPARATOR, table, "bytes", _encode_bytes)
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            f"data.tokenizer={name!r} needs an extra package: pip install qkvjax[bpe]"
            " (or use --config.data.tokenizer=bytes)"
        ) from None
    if kind == "gpt2":
        files = tuple(gpt2_files(path))
        table = _gpt2_table(files[0])
        separator = GPT2_SEPARATOR
    else:
        files = (path,)
        table, separator = read_tokenizer_json(path)
    library = _load_library(tokenizers, kind, path, files)
    encode = BpeEncoder(library, table)
    return Tokenizer(
        name=kind,
        separator=separator,
        table=table,
        fingerprint=_files_digest(files),
        _encode=encode,
        special=_special_tokens(kind, library),
        spec=name,
        cuts="nowhere" if encode.by_word is None else "words",
    )


def tokenizer_files(name: str) -> tuple[Path, ...]:
    """Returns the files that `data.tokenizer` reads, in the order of its fingerprint.

    Raises:
      UserError: `name` is not a tokenizer, or one of its files is missing.
    """
    kind, path = _parse(name)
    if kind == "bytes":
        return ()
    files = (path,) if kind == "bpe" else tuple(gpt2_files(path))
    for file in files:
        if not file.is_file():
            raise UserError(f"data.tokenizer={name!r}: there is no file {file}: check the path")
    return files


def tokenizer_fingerprint(name: str) -> str:
    """Returns `Tokenizer.fingerprint` of `data.tokenizer` without loading the tokenizer."""
    files = tokenizer_files(name)
    return _files_digest(files) if files else "bytes"


def tokenizer_size(name: str) -> int:
    """Returns the number of ids of `data.tokenizer`.

    This needs no library, and for gpt2: no files.
    """
    kind, path = _parse(name)
    if kind == "bytes":
        return _BYTES_SEPARATOR + 1
    if kind == "gpt2":
        return GPT2_IDS
    table, _ = read_tokenizer_json(path)
    return len(table)


def _files_digest(files: Iterable[Path]) -> str:
    digests = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
    return hashlib.sha256(digests).hexdigest()


def _parse(name: str) -> tuple[str, Path]:
    """Returns (kind, path); the path has no meaning for "bytes"."""
    kind, _, path = name.partition(":")
    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS)
        raise UserError(f"data.tokenizer={name!r} is not one of bytes, bpe:PATH, gpt2:PATH{hint}")
    if (kind == "bytes") == bool(path):
        form = "bytes alone" if kind == "bytes" else f"{kind}:PATH"
        raise UserError(f"data.tokenizer={name!r}: write {form}")
    return kind, expanded(path)


def _encode_bytes(document: bytes) -> np.ndarray:
    return np.frombuffer(document, np.uint8).astype(np.int32)


def _gpt2_table(encoder: Path) -> tuple[bytes, ...]:
    """Reads the bytes of each id of GPT-2."""
    vocabulary = read_object(encoder)
    if len(vocabulary) != GPT2_IDS:
        raise UserError(
            f"{encoder} is not a vocabulary of GPT-2's {GPT2_IDS:,} ids: save another tokenizer as"
            " a tokenizer.json and use bpe:PATH"
        )
    return bytes_of_ids(encoder, vocabulary, (), GPT2_IDS, GPT2_SEPARATOR)


def _load_library(tokenizers, kind: str, path: Path, files: tuple[Path, ...]):
    """Returns a `tokenizers.Tokenizer` that encodes documents as they are."""
    try:
        if kind == "gpt2":
            encoder, merges = files
            model = tokenizers.models.BPE.from_file(str(encoder), str(merges))
            library = tokenizers.Tokenizer(model)
            library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        else:
            library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  (the library raises nothing narrower)
        raise UserError(
            f"{path} is not a tokenizer that tokenizers {tokenizers.__version__} can read"
            f" ({error}): copy it again, or save it with that version"
        ) from None
    library.no_truncation()
    library.no_padding()
    # Where a document spells a special token, it means these characters.
    library.encode_special_tokens = True
    return library


def _special_tokens(kind: str, library) -> dict[int, str]:
    """Returns id -> name of the tokens that stand for no text."""
    if kind == "gpt2":
        return {GPT2_SEPARATOR: SEPARATORS[0]}
    added = library.get_added_tokens_decoder().items()
    return {i: token.content for i, token in added if token.special}
