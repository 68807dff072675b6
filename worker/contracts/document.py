"""A document on its way in, and what the mill says of it on the way out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Reason = Literal[
    "empty", "malformed", "not_utf8", "missing_field", "wrong_type", "too_large", "model_failure", "crashed_worker"
]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why one document cannot be tagged; it becomes a reject and the rest goes on."""

    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Document:
    """One document: either ``text``, or ``words`` that were split before (CoNLL), or a ``fault``.

    Attributes:
        id: The reader's name for it; ``path:line`` where the input has none.
        text: Unicode text; its code points are what entity offsets count.
        words: Words of pre-split input; the text is then their join by single spaces.
        gold_tags: One IOB2 tag a word, where the input has them.
        fields: Other fields of the input record, kept as JSON.
        fault: Set by a source that found the document unfit.
    """

    id: str
    text: str | None = None
    words: tuple[str, ...] | None = None
    gold_tags: tuple[str, ...] | None = None
    fields: dict[str, Any] | None = None
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class Entity:
    """One span; ``text == document_text[start:end]``.

    Attributes:
        start: First code point.
        end: One past the last code point.
        label: Label without its B-/I- prefix.
        text: The span's text.
        score: Probability in [0, 1], aggregated over the span's words by their mean.
    """

    start: int
    end: int
    label: str
    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Annotation:
    """What the mill says of one document; ``fault`` is set where it could not be tagged."""

    entities: tuple[Entity, ...]
    tags: tuple[str, ...] | None = None
    fault: Fault | None = None
