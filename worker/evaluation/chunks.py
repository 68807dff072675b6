"""Tags to chunks: what conlleval and strict IOB2 see in a block of tagged documents, as arrays."""

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

O, B, I, E, S = range(5)  # noqa: E741 - the field's own names
_PREFIXES = {"B": B, "I": I, "E": E, "L": E, "S": S, "U": S}
NO_LABEL = -1


class LabelIndex:
    """Labels and tags by number, in the order in which they were met.

    Args:
        choice: Under which names they count, and which do not.

    Attributes:
        names: LabelIndex, by number, under the names that they count by.
        changes: Entities whose label was mapped or left out: see ``contracts.labels``.
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
        """A label's number; NO_LABEL for one that is left out."""
        name = self.choice.target(name)
        if name not in self._labels:
            self._labels[name] = len(self.names)
            self.names.append(name)
        return self._labels[name]

    def tag(self, tag: str) -> tuple[int, int]:
        """A tag's prefix and label.

        Raises:
            UsageError: no tag of any scheme.
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
        """Notes how often a tag that begins an entity was met in ``gold`` or ``predicted``."""
        prefix, _, label = tag.partition("-")
        name = self.choice.target(label)
        if times and prefix == "B" and name != label:
            self.changes[key(side, label, name)] += times


@dataclass(frozen=True, slots=True)
class Tags:
    """The words of a block of documents, laid one behind another, with their IOB2 tags.

    Attributes:
        offsets: First word of each document, and the number of words; (documents + 1,).
        prefix: O, B or I of each word.
        label: Label of each word, NO_LABEL outside.
    """

    offsets: Ints
    prefix: Ints
    label: Ints


@dataclass(frozen=True, slots=True)
class Chunks:
    """Entities in a block's words, sorted, none overlapping another.

    Attributes:
        start: First word.
        end: One past the last word.
        label: Label of the first word, which is that of all.
        document: Document within the block.
        strict: Whether it begins with ``B-``; those that do not are no entities in strict mode.
    """

    start: Ints
    end: Ints
    label: Ints
    document: Ints
    strict: Bools

    def __len__(self) -> int:
        return len(self.start)

    def keep(self, which: Bools) -> Chunks:
        """Some of them."""
        return Chunks(self.start[which], self.end[which], self.label[which], self.document[which], self.strict[which])


def read_tags(flat: pa.Array[Any], offsets: Ints, labels: LabelIndex, *, normalise: bool) -> Tags:
    """Tags of a block as arrays.

    Args:
        flat: Tags of all words, strings or dictionary-encoded strings.
        offsets: First word of each document, and the number of words.
        labels: Where labels get their numbers.
        normalise: For gold: every chunk that conlleval sees begins with ``B-``, whatever scheme it was written
            in. Predictions are taken as they are, so that strict mode sees their faults; only BIOES's
            ``E-`` and ``S-`` are rewritten.

    Raises:
        UsageError: a tag of no scheme.
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
    """The chunks that conlleval sees.

    A chunk begins at ``B-``, and at an ``I-`` that follows ``O``, another label or the document's beginning.
    Strict IOB2 sees exactly those that begin with ``B-``.
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
    """Which predicted chunks are gold chunks: same words, same label."""
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
