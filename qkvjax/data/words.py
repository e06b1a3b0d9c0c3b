"""Exact byte-level BPE of long texts, several times as fast as the library alone.

A BPE tokenizer cuts a text into pre-tokens by a regular expression and merges bytes within each of
them only. A text may therefore be cut wherever that expression always ends a pre-token, whatever
stands around, and the ids of the parts are the ids of the whole. Words repeat, so the ids of each
word are computed once, checked once, and looked up afterwards.

Only expressions that were examined are cut this way; `cutter` returns None for any other, and the
whole text goes through the library. What is examined for each of them:

- A match never contains a space after a character that is not white space, so a single space
  between two such characters begins a pre-token.
- Whether a run of white space is cut in two depends on whether text follows it (`\\s+(?!\\S)`), so
  a run always stays with the text that follows.
- GPT-2's expression ends a match at each change between letters, digits and other characters,
  but for the apostrophe of 's, 't, 're, ...
- In the expressions of cl100k, Llama 3, Qwen and o200k a character may join the letters after it,
  line ends and slashes join the punctuation before them, and o200k's words take their 's.

Which characters outside ASCII are letters or digits depends on the version of Unicode, so they
count as unknown here.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

_PUNCTUATION = r"!-&(-/:-@\[-`{-~"  # of ASCII, without the apostrophe
_BEYOND = "\x80-\U0010ffff"
# Unicode's White_Space, which \s means in the tokenizers; Python's \s has \x1c to \x1f besides.
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_GPT2_WORD = re.compile(
    rf"[{_SPACE}]*+"
    rf"(?:[A-Za-z]++(?![{_BEYOND}])"
    rf"|[0-9]++(?![{_BEYOND}])"
    rf"|[{_PUNCTUATION}]++(?!['{_BEYOND}\x00-\x08\x0e-\x1f\x7f])"
    rf"|[^{_SPACE}]+)"
    rf"|[{_SPACE}]+"
)
# Where a text may be cut under all the expressions; few enough to look for in a large document.
_ANY_CUT = rf"(?<=[^{_SPACE}])(?= [^{_SPACE}])|(?<=[^{_SPACE}]\n)(?=[^{_SPACE}/])"
_CUT = re.compile(_ANY_CUT)
_CL100K_WORD = re.compile(
    rf"[{_SPACE}]*+[A-Za-z]++(?=[{_SPACE}{_PUNCTUATION}])"
    rf"|[{_SPACE}]*+[^{_SPACE}](?s:.*?)(?:(?<=[A-Za-z0-9])(?=[{_SPACE}])|{_ANY_CUT}|\Z)"
    rf"|[{_SPACE}]+"
)
_WINDOW = 2048  # bytes that are searched for a cut first

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
EXPRESSIONS = {
    _GPT2: _GPT2_WORD,
    _CONTRACTIONS + _LETTERS + r"|\p{N}{1,3}" + _REST: _CL100K_WORD,
    _CONTRACTIONS + _LETTERS + r"|\p{N}" + _REST: _CL100K_WORD,
    _O200K: _CL100K_WORD,
}
_MOST_WORDS = 400_000  # remembered; about 60 MB
_MOST_CHARACTERS = 8_000_000


def word_expression(description: dict) -> re.Pattern | None:
    """The expression of words for a tokenizer.json, None where a text must stay whole.

    It holds for texts without any of `added_texts(description)`.
    """
    if description.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    if (description.get("model") or {}).get("dropout"):
        return None
    for token in description.get("added_tokens") or ():
        wide = any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word"))
        spaced = any(character.isspace() for character in token["content"])
        if not token.get("special") and (wide or spaced):
            return None  # it may join what stands on both sides of a cut
    steps = description.get("pre_tokenizer")
    if not isinstance(steps, dict):
        return None
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    *before, last = [step for step in steps if step["type"] != "Digits"] or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        return None if before else _GPT2_WORD
    if len(before) != 1 or before[0]["type"] != "Split":
        return None
    (split,) = before
    if split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    return EXPRESSIONS.get(split["pattern"].get("Regex"))


def added_texts(description: dict) -> tuple[str, ...]:
    """The texts of added tokens that are looked for in a document before it is cut into words."""
    added = description.get("added_tokens") or ()
    return tuple(token["content"] for token in added if not token.get("special"))


def safe_cut(document: bytes, start: int, end: int) -> int | None:
    """The last place in document[start:end] where a text may be cut, or None.

    Raises:
      UnicodeDecodeError: that part is not UTF-8.
    """
    end = _character(document, end)
    window = _WINDOW
    while True:
        first = max(start, _character(document, max(start, end - window)))
        text = document[first:end].decode("utf-8")
        places = [match.start() for match in _CUT.finditer(text)]
        if places:
            return first + len(text[: places[-1]].encode())
        if first == start:
            return None
        window *= 8


def next_cut(document: bytes, start: int) -> int | None:
    """The first place after `start`, where a character begins, at which a text may be cut."""
    text = document[start:].decode("utf-8", "ignore")  # the end may lie within a character
    match = _CUT.search(text)
    return None if match is None else start + len(text[: match.start()].encode())


def _character(document, at):
    """The start of the character that `at` stands in."""
    for back in range(min(3, at) + 1):
        if at - back == len(document) or document[at - back] & 0xC0 != 0x80:
            return at - back
    return at


class WordEncoder:
    """Ids of a text, looked up word by word.

    Args:
      word: an expression whose matches are the words of a text, from `cutter`.
      encode_words: texts -> their ids; raises what a text that is refused raises.
      dtype: of the ids.
    """

    def __init__(
        self,
        word: re.Pattern,
        encode_words: Callable[[list[str]], list[list[int]]],
        dtype=np.int32,
    ):
        self._word = word
        self._encode_words = encode_words
        self._dtype = dtype
        self._forget()

    def _forget(self):
        self._numbers = _Numbers()
        self._counts = np.empty(0, np.int64)
        self._starts = np.empty(0, np.int64)
        self._ids = np.empty(0, self._dtype)

    def __call__(self, text: str) -> np.ndarray:
        """The ids of a text, [n]."""
        words = self._word.findall(text)
        if not words:
            return np.empty(0, self._dtype)
        numbers = np.fromiter(map(self._numbers.__getitem__, words), np.int64, len(words))
        if self._numbers.new:
            try:
                self._learn()
            except BaseException:
                self._forget()  # words without ids must not stay
                raise
        ids = gather(self._ids, self._starts[numbers], self._counts[numbers])
        if len(self._numbers) > _MOST_WORDS or self._numbers.characters > _MOST_CHARACTERS:
            self._forget()
        return ids

    def _learn(self):
        new = self._encode_words(self._numbers.new)
        counts = np.fromiter(map(len, new), np.int64, len(new))
        flat = np.fromiter((i for ids in new for i in ids), self._dtype, int(counts.sum()))
        starts = len(self._ids) + np.cumsum(counts) - counts
        self._ids = np.concatenate([self._ids, flat])
        self._starts = np.concatenate([self._starts, starts])
        self._counts = np.concatenate([self._counts, counts])
        self._numbers.new = []


class _Numbers(dict):
    """Word -> its number; a new word gets the next one."""

    def __init__(self):
        super().__init__()
        self.new = []
        self.characters = 0

    def __missing__(self, word):
        number = self[word] = len(self)
        self.new.append(word)
        self.characters += len(word)
        return number


def gather(values: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """values[start : start + count] of each pair, one after the other."""
    ends = np.cumsum(counts)
    if not len(ends):
        return values[:0]
    places = np.repeat(starts - (ends - counts), counts)
    places += np.arange(ends[-1])
    return values[places]
