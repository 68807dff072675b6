"""Documents as sources yield them, and annotations as the worker returns them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Reason = Literal[
    "empty", "malformed", "not_utf8", "missing_field", "wrong_type", "too_large", "model_failure", "crashed_worker"
]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a document cannot be tagged; the document becomes a reject.

    Attributes:
        reason: One of the fixed reasons, for programs.
        message: What is wrong and where, for people.
    """

    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Document:
    """One document: exactly one of ``text``, ``words`` and ``fault`` is set.

    Attributes:
        id: The id from the input; ``path:line`` where the input has none.
        text: Unicode text; offsets of entities count its code points.
        words: Words of input that is split already, such as CoNLL; the text is then the words joined by single spaces.
        gold_tags: One IOB2 tag for each word, where the input has tags.
        fields: Other fields of the input record, written as JSON.
        fault: Why the source could not read the document.
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
    """The result for one document.

    Attributes:
        entities: The entities, in order.
        tags: One IOB2 tag for each word, where the document was given as words.
        fault: Why the document could not be tagged; None where it was.
    """

    entities: tuple[Entity, ...]
    tags: tuple[str, ...] | None = None
    fault: Fault | None = None
