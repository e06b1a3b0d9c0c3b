"""Exact byte-level BPE of long texts, several times as fast as the library alone.

A BPE tokenizer cuts a text into pre-tokens by a regular expression, and merges bytes only within
each pre-token. So a text may be cut wherever that expression always ends a pre-token, whatever text
stands around that place; the ids of the parts are then the ids of the whole. Words repeat, so the
ids of each word are computed and checked once, and looked up afterwards.

Only expressions that were examined are cut this way. `word_expression` returns None for any other,
and the whole text goes to the library. Why the cuts below are safe for the examined expressions:

- A match never contains a space after a character that is not white space. So a single space
  between two such characters begins a pre-token.
- Whether a run of white space is cut in two depends on whether text follows it (`\\s+(?!\\S)`). So
  a run always stays with the text that follows.
- GPT-2's expression ends a match at each change between letters, digits and other characters,
  except for the apostrophe of 's, 't, 're, ...
- In the expressions of cl100k, Llama 3, Qwen and o200k, a character may join the letters after it,
  line ends and slashes may join the punctuation before them, and o200k's words include their 's.

Which characters outside ASCII are letters or digits depends on the version of Unicode, so the
expressions here treat them as unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from qkvjax.data.utf8 import character_start

_PUNCTUATION = r"!-&(-/:-@\[-`{-~"  # of ASCII, without the apostrophe
_NON_ASCII = "\x80-\U0010ffff"
# Unicode's White_Space, which is \s in the tokenizers. Python's \s also matches \x1c to \x1f.
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# A word is a run of letters, digits or punctuation with the white space before it. If the character
# after the run may belong to it, the word is everything up to the next white space instead.
_GPT2_WORD = re.compile(
    rf"[{_SPACE}]*+"
    rf"(?:[A-Za-z]++(?![{_NON_ASCII}])"
    rf"|[0-9]++(?![{_NON_ASCII}])"
    rf"|[{_PUNCTUATION}]++(?!['{_NON_ASCII}\x00-\x08\x0e-\x1f\x7f])"
    rf"|[^{_SPACE}]+)"
    rf"|[{_SPACE}]+"
)
# Where a text may be cut under all the expressions: before a single space or after a single line
# end, between characters that are not white space.
_ANY_CUT = rf"(?<=[^{_SPACE}])(?= [^{_SPACE}])|(?<=[^{_SPACE}]\n)(?=[^{_SPACE}/])"
_CUT = re.compile(_ANY_CUT)
# A word is a run of letters that white space or punctuation follows, or else everything up to a
# place where the text may be cut.
_CL100K_WORD = re.compile(
    rf"[{_SPACE}]*+[A-Za-z]++(?=[{_SPACE}{_PUNCTUATION}])"
    rf"|[{_SPACE}]*+[^{_SPACE}](?s:.*?)(?:(?<=[A-Za-z0-9])(?=[{_SPACE}])|{_ANY_CUT}|\Z)"
    rf"|[{_SPACE}]+"
)
_WINDOW_BYTES = 2048  # searched for a cut first

# The examined expressions, as a tokenizer.json writes them, and the words that each allows.
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
# Known words are forgotten beyond these limits; they take about 60 MB.
_MAX_WORDS = 400_000
_MAX_CHARACTERS = 8_000_000


def word_expression(description: dict) -> re.Pattern | None:
    """Returns the expression whose matches are the words of a text; None: a text must stay whole.

    It is exact for texts without any of `added_texts(description)`.

    Args:
      description: the content of a tokenizer.json.
    """
    if description.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    if (description.get("model") or {}).get("dropout"):
        return None
    if any(_may_join_a_cut(token) for token in description.get("added_tokens") or ()):
        return None
    steps = description.get("pre_tokenizer")
    if not isinstance(steps, dict):
        return None
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    # A Digits step only adds cuts.
    *before, last = [step for step in steps if step["type"] != "Digits"] or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        return None if before else _GPT2_WORD
    if len(before) != 1 or before[0]["type"] != "Split":
        return None
    split = before[0]
    if split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    return EXPRESSIONS.get(split["pattern"].get("Regex"))


def _may_join_a_cut(token: dict) -> bool:
    """Returns whether an added token may contain the text on both sides of a cut."""
    takes_neighbours = any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word"))
    has_space = any(character.isspace() for character in token["content"])
    return not token.get("special") and (takes_neighbours or has_space)


def added_texts(description: dict) -> tuple[str, ...]:
    """Returns the texts of added tokens, which the library finds before it cuts a text into words.

    Args:
      description: the content of a tokenizer.json.
    """
    added = description.get("added_tokens") or ()
    return tuple(token["content"] for token in added if not token.get("special"))


def safe_cut(document: bytes, start: int, end: int) -> int | None:
    """Returns the last place in document[start:end] where a text may be cut, or None.

    Raises:
      UnicodeDecodeError: that part is not UTF-8.
    """
    end = character_start(document, end)
    window = _WINDOW_BYTES
    while True:
        first = max(start, character_start(document, end - window))
        text = document[first:end].decode("utf-8")
        cuts = [match.start() for match in _CUT.finditer(text)]
        if cuts:
            return first + len(text[: cuts[-1]].encode())
        if first == start:
            return None
        window *= 8


def next_cut(document: bytes, start: int) -> int | None:
    """Returns the first place after `start` where a text may be cut, or None.

    Args:
      start: where a character begins.
    """
    text = document[start:].decode("utf-8", "ignore")  # the end may lie within a character
    match = _CUT.search(text)
    return None if match is None else start + len(text[: match.start()].encode())


class WordEncoder:
    """Maps a text to ids, which it looks up word by word.

    Args:
      word: an expression whose matches are the words of a text, from `word_expression`.
      encode_words: maps texts to their ids; may raise for a text that cannot be encoded.
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

    def _forget(self) -> None:
        """Starts with no known words.

        The ids of word number i are ids[starts[i] : starts[i] + counts[i]].
        """
        self._numbers = _WordNumbers()
        self._counts = np.empty(0, np.int64)
        self._starts = np.empty(0, np.int64)
        self._ids = np.empty(0, self._dtype)

    def __call__(self, text: str) -> np.ndarray:
        """Returns the ids of a text, [n]."""
        words = self._word.findall(text)
        if not words:
            return np.empty(0, self._dtype)
        numbers = np.fromiter(map(self._numbers.__getitem__, words), np.int64, len(words))
        if self._numbers.new:
            try:
                self._encode_new_words()
            except BaseException:
                self._forget()  # a word with a number must have ids
                raise
        ids = gather(self._ids, self._starts[numbers], self._counts[numbers])
        if len(self._numbers) > _MAX_WORDS or self._numbers.num_characters > _MAX_CHARACTERS:
            self._forget()
        return ids

    def _encode_new_words(self) -> None:
        encoded = self._encode_words(self._numbers.new)
        counts = np.fromiter(map(len, encoded), np.int64, len(encoded))
        flat = np.fromiter((i for ids in encoded for i in ids), self._dtype, int(counts.sum()))
        starts = len(self._ids) + np.cumsum(counts) - counts
        self._ids = np.concatenate([self._ids, flat])
        self._starts = np.concatenate([self._starts, starts])
        self._counts = np.concatenate([self._counts, counts])
        self._numbers.new = []


class _WordNumbers(dict):
    """Word -> its number; looking up a new word gives it the next number.

    Attributes:
      new: the words that have no ids yet.
      num_characters: of all words.
    """

    def __init__(self):
        super().__init__()
        self.new = []
        self.num_characters = 0

    def __missing__(self, word: str) -> int:
        number = len(self)
        self[word] = number
        self.new.append(word)
        self.num_characters += len(word)
        return number


def gather(values: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns values[start : start + count] of each pair, one after the other."""
    ends = np.cumsum(counts)
    if not len(ends):
        return values[:0]
    # Element j of the result, in stretch i, is values[starts[i] + j - (ends[i] - counts[i])].
    indices = np.repeat(starts - (ends - counts), counts)
    indices += np.arange(ends[-1])
    return values[indices]
