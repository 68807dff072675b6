"""Finds the chunks of tagged documents, as conlleval and as strict IOB2 define them; all as arrays."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.labels import LabelChoice, key
from nermill.worker.contracts.tags import split_tag

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

O, B, I, E, S = range(5)  # noqa: E741 - names of the tag prefixes
_PREFIXES = {"B": B, "I": I, "E": E, "L": E, "S": S, "U": S}
NO_LABEL = -1


class LabelIndex:
    """Numbers of labels and tags, assigned in the order in which they first occur.

    Args:
        choice: Which labels are renamed or left out.

    Attributes:
        names: Name of each label after renaming, by number.
        changes: Counter of label changes; see ``contracts.labels``.
    """

    def __init__(self, choice: LabelChoice | None = None) -> None:
        self.choice = choice or LabelChoice()
        self.names: list[str] = []
        self.changes: Counter[str] = Counter()
        self._labels: dict[str, int] = {"": NO_LABEL}
        self._tags: dict[str, tuple[int, int]] = {"O": (O, NO_LABEL)}

    def __len__(self) -> int:
        return len(self.names)

    def label(self, name: str) -> int:
        """The number of a label; NO_LABEL for a label that is left out."""
        name = self.choice.target(name)
        if name not in self._labels:
            self._labels[name] = len(self.names)
            self.names.append(name)
        return self._labels[name]

    def tag(self, tag: str) -> tuple[int, int]:
        """Numbers of a tag's prefix and label.

        Raises:
            UsageError: the tag belongs to no scheme.
        """
        if tag not in self._tags:
            parsed = split_tag(tag)
            if parsed is None:
                raise UsageError(f"tag {tag!r} fits no scheme; tags are 'O' or like 'B-PER'")
            prefix, name = parsed
            label = self.label(name)
            self._tags[tag] = O if label == NO_LABEL else _PREFIXES[prefix], label
        return self._tags[tag]

    def count(self, side: str, tag: str, times: int) -> None:
        """Counts label changes.

        Args:
            side: ``gold`` or ``predicted``.
            tag: A tag; only those with ``B-`` begin an entity and count.
            times: How often it occurred.
        """
        prefix, _, label = tag.partition("-")
        name = self.choice.target(label)
        if times and prefix == "B" and name != label:
            self.changes[key(side, label, name)] += times


@dataclass(frozen=True, slots=True)
class Tags:
    """The IOB2 tags of a block's words; documents are concatenated.

    Attributes:
        offsets: First word of each document, and the number of words; int64, shape (documents + 1,).
        prefix: O, B or I of each word; int64, shape (words,).
        label: Label of each word, NO_LABEL outside of entities; int64, shape (words,).
    """

    offsets: Ints
    prefix: Ints
    label: Ints


@dataclass(frozen=True, slots=True)
class Chunks:
    """The entities of a block, sorted, without overlap; arrays of shape (chunks,), int64 unless said otherwise.

    Attributes:
        start: First word.
        end: One past the last word.
        label: Label of all its words.
        document: Document within the block.
        strict: Whether it begins with ``B-``, bool; in strict mode other chunks are no entities.
    """

    start: Ints
    end: Ints
    label: Ints
    document: Ints
    strict: Bools

    def __len__(self) -> int:
        return len(self.start)

    def keep(self, which: Bools) -> Chunks:
        """The chunks that a mask selects; bool, shape (chunks,)."""
        return Chunks(self.start[which], self.end[which], self.label[which], self.document[which], self.strict[which])


def read_tags(flat: pa.Array[Any], offsets: Ints, labels: LabelIndex, *, normalise: bool) -> Tags:
    """Tags of a block as arrays.

    Args:
        flat: Tags of all words, strings or dictionary-encoded strings.
        offsets: First word of each document, and the number of words.
        labels: Assigns numbers to labels.
        normalise: True for gold: every chunk of conlleval gets a ``B-``, in whatever scheme it was written. False for
            predictions: tags stay as they are, so that strict mode sees errors in them; only ``E-`` and ``S-`` of
            BIOES are converted.

    Raises:
        UsageError: a tag belongs to no scheme.
    """
    encoded: Any = flat if pa.types.is_dictionary(flat.type) else flat.dictionary_encode()
    tags = encoded.dictionary.to_pylist()
    table = np.array([labels.tag(tag) for tag in tags], np.int64).reshape(-1, 2)
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    for tag, times in zip(tags, np.bincount(codes, minlength=len(tags)).tolist(), strict=True):
        labels.count("gold" if normalise else "predicted", tag, times)
    prefix, label = table[codes, 0], table[codes, 1]
    starts = _starts(prefix, label, offsets)
    rewritten = np.where(starts, B, I)
    keep = prefix == O if normalise else prefix <= I
    return Tags(offsets, np.where(keep, prefix, rewritten), label)


def find_chunks(tags: Tags) -> Chunks:
    """The chunks as conlleval defines them.

    A chunk begins at a ``B-``, and at an ``I-`` after ``O``, after another label, or at the begin of a document. In
    strict IOB2 only those with ``B-`` are chunks.
    """
    starts = _starts(tags.prefix, tags.label, tags.offsets)
    breaks = starts | (tags.prefix == O)
    breaks[tags.offsets[:-1][tags.offsets[:-1] < len(breaks)]] = True
    at = np.append(np.flatnonzero(breaks), len(breaks))
    start = np.flatnonzero(starts)
    end = at[np.searchsorted(at, start, side="right")]
    document = np.searchsorted(tags.offsets, start, side="right") - 1
    return Chunks(start, end, tags.label[start], document, tags.prefix[start] == B)


def find_correct(gold: Chunks, predicted: Chunks) -> Bools:
    """Which predicted chunks are in gold, with the same words and the same label; bool, shape (predicted,)."""
    if not len(gold):
        return np.zeros(len(predicted), np.bool_)
    at = np.minimum(np.searchsorted(gold.start, predicted.start), len(gold) - 1)
    same: Bools = (gold.start[at] == predicted.start) & (gold.end[at] == predicted.end)
    same &= gold.label[at] == predicted.label
    return same


def _starts(prefix: Ints, label: Ints, offsets: Ints) -> Bools:
    before, label_before = np.roll(prefix, 1), np.roll(label, 1)
    first = offsets[:-1][offsets[:-1] < len(prefix)]
    before[first], label_before[first] = O, NO_LABEL
    opens = (prefix == B) | (prefix == S) | (before == O) | (before >= E) | (label != label_before)
    starts: Bools = (prefix != O) & opens
    return starts
