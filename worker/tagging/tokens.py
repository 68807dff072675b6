"""Turns documents into tokens; the tokens of pieces of text are cached.

A tokenizer of BERT's kind (``BertNormalizer``, ``BertPreTokenizer``, WordPiece) normalises each character for itself,
ends a word at each blank and makes a word of each punctuation mark. So a text can be divided at ASCII blanks and
punctuation marks, and its tokens are the concatenated tokens of the pieces. Marks that ``CASE_PATTERNS`` put behind
words change nothing of that. A text is given to the tokenizer undivided where it does not hold: with a tokenizer of
another kind, and where the text contains a special token such as ``[SEP]``. In lists of words each word is a piece,
since every tokenizer treats words separately.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nermill.worker.tagging.batching import spread

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

MOST_PIECES = 1 << 16  # cached pieces after which the cache is emptied
MOST_BYTES = 1 << 24  # the same in bytes of their text

Int = NDArray[np.int64]

# Kind of each byte of UTF-8: part of a word (also every byte of a character beyond ASCII), blank, or punctuation mark.
# The underscore is part of a word, as in the rule by which added tokens match whole words only.
_WORD, _BLANK, _MARK = 0, 1, 2
_KIND = np.zeros(256, np.uint8)
_KIND[list(b" \t\n\r")] = _BLANK
_KIND[list(b"!\"#$%&'()*+,-./:;<=>?@[\\]^`{|}~")] = _MARK


_PART = r"[\p{L}\p{M}\p{N}]"  # of a word
# Where a normalizer may put a mark: behind a word in capitals, then behind a word that begins with a capital letter.
# They look at a word and the characters beside it, so that they match in a piece as in the text.
CASE_PATTERNS = (rf"(?<!{_PART})\p{{Lu}}{{2,}}(?!{_PART})\K", rf"(?<!{_PART})\p{{Lu}}{_PART}*+(?!⇪)\K")


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of many documents, concatenated, without special tokens.

    Attributes:
        ids: Token ids, int64, shape (tokens,).
        bounds: First token of each document, and the number of tokens, int64, shape (documents + 1,).
        words: Number of each token's word within its document, int64, shape (tokens,).
        start, end: Half-open code points of each token, int64, shape (tokens,): within its text, or within its word
            where the document is a list of words.
    """

    ids: Int
    bounds: Int
    words: Int
    start: Int
    end: Int

    @property
    def counts(self) -> Int:
        """Number of tokens of each document, int64, shape (documents,)."""
        return np.diff(self.bounds)


def tokenize(tokenizer: Tokenizer, documents: Sequence[str] | Sequence[Sequence[str]], *, split: bool) -> Tokens:
    """Tokenizes documents without the cache.

    Args:
        tokenizer: Without truncation and padding.
        documents: Texts, or lists of words where ``split``.
        split: Whether documents are lists of words.
    """
    encodings = tokenizer.encode_batch(documents, is_pretokenized=split, add_special_tokens=False)
    return _columns(encodings)


def _columns(encodings: Sequence[Encoding]) -> Tokens:
    bounds = _bounds(np.fromiter(map(len, encodings), np.int64, len(encodings)))
    total = int(bounds[-1])
    ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int64, total)
    words = np.fromiter(chain.from_iterable(e.word_ids for e in encodings), np.int64, total)
    offsets = np.fromiter(chain.from_iterable(chain.from_iterable(e.offsets for e in encodings)), np.int64, 2 * total)
    return Tokens(ids, bounds, words, offsets[::2], offsets[1::2])


def _bounds(counts: Int) -> Int:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


class CachedTokenizer:
    """Tokenizes with a cache; ids, words and offsets are those of ``tokenize``. Threads may share it.

    Args:
        tokenizer: Without truncation and padding.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        state = json.loads(tokenizer.to_str())
        added = state["added_tokens"]
        crossing = [token for token in added if _KIND[list(token["content"].encode())].any()]
        self._whole = [token["content"] for token in crossing]  # texts with one of these are not divided
        self._divides_texts = _is_bert(state) and not any(
            token["lstrip"] or token["rstrip"] for token in added if token not in crossing
        )
        self._texts = _Cache(tokenizer, split=False)
        self._words = _Cache(tokenizer, split=True)

    def tokenize(self, documents: Sequence[str] | Sequence[Sequence[str]], *, split: bool) -> Tokens:
        """Tokenizes documents.

        Args:
            documents: Texts, or lists of words where ``split``.
            split: Whether documents are lists of words.
        """
        if split:
            return self._tokenize_words(documents)
        if not self._divides_texts:
            return tokenize(self._tokenizer, documents, split=False)
        texts: list[str] = list(documents)  # type: ignore[arg-type]
        together = "\n".join(texts)
        crossing = [content for content in self._whole if content in together]
        whole = [n for n, text in enumerate(texts) if any(c in text for c in crossing)] if crossing else []
        if not whole:
            return self._tokenize_texts(texts)
        apart = set(whole)
        rest = [n for n in range(len(texts)) if n not in apart]
        answers = tokenize(self._tokenizer, [texts[n] for n in whole], split=False)
        return _merged([(rest, self._tokenize_texts([texts[n] for n in rest])), (whole, answers)])

    def _tokenize_words(self, documents: Sequence[Sequence[str]]) -> Tokens:
        counts = np.fromiter(map(len, documents), np.int64, len(documents))
        pieces = pa.array(list(chain.from_iterable(documents)), pa.string()).cast(pa.binary())
        number = np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)
        table, which = self._words.look_up(pieces)
        index = spread(table.begin[which], table.count[which])
        of_piece = np.repeat(np.arange(len(which)), table.count[which])
        bounds = _bounds(table.count[which])[_bounds(counts)]
        return Tokens(table.ids[index], bounds, number[of_piece], table.start[index], table.end[index])

    def _tokenize_texts(self, texts: list[str]) -> Tokens:
        pieces, piece_bounds, points = _divide(texts)
        table, which = self._texts.look_up(pieces)
        count = table.count[which]
        index = spread(table.begin[which], count)
        of_piece = np.repeat(np.arange(len(which)), count)
        words = _bounds(table.words[which])
        first_word = words[:-1] - np.repeat(words[piece_bounds[:-1]], np.diff(piece_bounds))
        shift = points[of_piece]
        return Tokens(
            table.ids[index],
            _bounds(count)[piece_bounds],
            table.word[index] + first_word[of_piece],
            table.start[index] + shift,
            table.end[index] + shift,
        )


def _is_bert(state: dict[str, Any]) -> bool:
    normalizer = state["normalizer"] or {}
    *marks, last = normalizer.get("normalizers", [normalizer])
    kinds = [(part or {}).get("type") for part in (last, state["pre_tokenizer"], state["model"])]
    marked = all(step["type"] == "Replace" and step["pattern"].get("Regex") in CASE_PATTERNS for step in marks)
    return marked and kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"]


def _divide(texts: list[str]) -> tuple[pa.Array[Any], Int, Int]:
    """Divides texts into pieces: runs of word bytes, runs of blanks, single punctuation marks.

    Returns:
        The pieces of all texts, binary, shape (pieces,); first piece of each text, and the number of pieces, int64,
        shape (texts + 1,); the code point of its text at which each piece begins, int64, shape (pieces,).
    """
    buffers: Any = pa.array(texts, pa.string()).buffers()
    _, offsets, data = buffers
    bounds = np.frombuffer(offsets, np.int32)[: len(texts) + 1].astype(np.int64)
    if data is None or not bounds[-1]:
        return pa.array([], pa.binary()), np.zeros(len(texts) + 1, np.int64), np.zeros(0, np.int64)
    content = np.frombuffer(data, np.uint8)[: bounds[-1]]
    kind = _KIND[content]
    begins = np.ones(len(content), bool)
    begins[1:] = (kind[1:] != kind[:-1]) | (kind[1:] == _MARK)
    begins[bounds[:-1][bounds[:-1] < len(content)]] = True
    first = np.flatnonzero(begins)
    ends = pa.py_buffer(np.append(first, len(content)).astype(np.int32).tobytes())
    pieces = pa.Array.from_buffers(pa.binary(), len(first), [None, ends, data])
    piece_bounds = np.searchsorted(first, bounds)
    # number of code points before each byte: bytes 10xxxxxx continue a code point
    point = _bounds((content & 0xC0) != 0x80)
    return pieces, piece_bounds, point[first] - np.repeat(point[bounds[:-1]], np.diff(piece_bounds))


def _merged(parts: list[tuple[list[int], Tokens]]) -> Tokens:
    """The tokens of several groups of documents, in the order of the documents.

    Args:
        parts: Numbers and tokens of each group's documents.
    """
    numbers = np.concatenate([np.array(numbers, np.int64) for numbers, _ in parts])
    order = np.argsort(numbers)
    shifts = np.cumsum([0, *(len(tokens.ids) for _, tokens in parts)])
    begin = np.concatenate([tokens.bounds[:-1] + shift for (_, tokens), shift in zip(parts, shifts, strict=False)])
    counts = np.concatenate([tokens.counts for _, tokens in parts])[order]
    index = spread(begin[order], counts)

    def column(name: str) -> Int:
        values: Int = np.concatenate([getattr(tokens, name) for _, tokens in parts])[index]
        return values

    return Tokens(column("ids"), _bounds(counts), column("words"), column("start"), column("end"))


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The tokens of cached pieces; int64, the first three of shape (pieces,), the others of shape (tokens,).

    Attributes:
        begin, count, words: First token, number of tokens and number of words of each piece.
        ids, word, start, end: Id, word within the piece, and half-open code points within the piece of each token.
    """

    begin: Int
    count: Int
    words: Int
    ids: Int
    word: Int
    start: Int
    end: Int


class _Cached:
    """The content of a cache.

    Other threads read it without a lock: ``pieces`` is replaced by a longer object before ``numbers`` gets new entries.

    Attributes:
        numbers: Number of each piece.
        pieces: Their tokens.
        bytes: Length of all pieces.
    """

    def __init__(self) -> None:
        self.numbers: dict[bytes, int] = {}
        self.pieces = _Pieces(*(np.zeros(0, np.int64) for _ in _Pieces.__slots__))
        self.bytes = 0


class _Cache:
    """A cache of the tokens of pieces.

    Args:
        tokenizer: Tokenizes new pieces.
        split: Whether pieces are words of a list, or pieces of a text.
    """

    def __init__(self, tokenizer: Tokenizer, *, split: bool) -> None:
        self._tokenizer, self._split = tokenizer, split
        self._lock = threading.Lock()
        self._cached = _Cached()

    def look_up(self, pieces: pa.Array[Any]) -> tuple[_Pieces, Int]:
        """The cached tokens, after new pieces have been added, and the number of each piece, int64, shape (pieces,)."""
        encoded: Any = pieces.dictionary_encode()
        distinct: list[bytes] = encoded.dictionary.to_pylist()
        cached = self._cached
        try:
            numbers = [cached.numbers[piece] for piece in distinct]
        except KeyError:
            with self._lock:
                cached = self._add(distinct)
                numbers = [cached.numbers[piece] for piece in distinct]
        return cached.pieces, np.array(numbers, np.int64)[np.asarray(encoded.indices, np.int64)]

    def _add(self, distinct: list[bytes]) -> _Cached:
        if len(self._cached.numbers) > MOST_PIECES or self._cached.bytes > MOST_BYTES:
            self._cached = _Cached()
        cached = self._cached
        new = [piece for piece in distinct if piece not in cached.numbers]
        begin = len(cached.pieces.begin)
        cached.pieces = _joined(cached.pieces, self._encoded(new))
        cached.numbers.update((piece, begin + n) for n, piece in enumerate(new))
        cached.bytes += sum(map(len, new))
        return cached

    def _encoded(self, pieces: list[bytes]) -> _Pieces:
        texts = [piece.decode() for piece in pieces]
        tokens = tokenize(self._tokenizer, [[text] for text in texts] if self._split else texts, split=self._split)
        words = np.zeros(len(pieces), np.int64)
        some = tokens.counts > 0
        words[some] = tokens.words[tokens.bounds[1:][some] - 1] + 1
        return _Pieces(tokens.bounds[:-1], tokens.counts, words, tokens.ids, tokens.words, tokens.start, tokens.end)


def _joined(one: _Pieces, other: _Pieces) -> _Pieces:
    begin = np.concatenate([one.begin, other.begin + len(one.ids)])
    rest = (np.concatenate([getattr(one, name), getattr(other, name)]) for name in _Pieces.__slots__[1:])
    return _Pieces(begin, *rest)
