"""How inputs are to be read, and what every reader says of a text in the same words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nermill.worker.contracts.document import Document, Fault
from nermill.worker.contracts.errors import UsageError

Format = Literal["jsonl", "conll", "text", "parquet"]
Unit = Literal["sentence", "document"]
FORMATS: tuple[Format, ...] = ("jsonl", "conll", "text", "parquet")


@dataclass(frozen=True)
class ReadOptions:
    """How inputs are read.

    Attributes:
        format: ``None`` looks at suffix and content of each file.
        unit: What a document of a CoNLL file is: a sentence, or what stands between ``-DOCSTART-`` lines.
        id_column: Field or column of the id; a record without one is called ``path:line``. Where it is not the default,
            a file in which no record has it is refused.
        text_column: Field or column of the text.
        keep_fields: Whether the other fields travel along.
        lines: Whether each line of a plain text is a document.
    """

    format: Format | None = None
    unit: Unit = "sentence"
    id_column: str = "id"
    text_column: str = "text"
    keep_fields: bool = False
    lines: bool = False


def text_document(identity: str, text: str, fields: dict[str, Any] | None = None) -> Document:
    """A document, or a reject where its text is empty or no Unicode text at all."""
    if not text.strip():
        return Document(identity, fault=Fault("empty", "the text is empty"))
    if not is_unicode(text):
        return Document(printable(identity), fault=Fault("not_utf8", "the text has lone surrogates"))
    return Document(identity, text=text, fields=fields)


def not_utf8(identity: str, error: UnicodeDecodeError) -> Document:
    """The reject of a document whose bytes are not UTF-8."""
    return Document(identity, fault=Fault("not_utf8", f"not UTF-8 (byte {error.object[error.start]:#04x})"))


def record_id(value: Any, fallback: str) -> str:
    """The id of a record as a string; ``fallback`` where it has none.

    Raises:
        TypeError: the id is a list, an object or bytes.
    """
    if value is None or value == "":
        return fallback
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, dict, bytes)):
        raise TypeError(f"the id is a {type(value).__name__}, not a string or number")
    return str(value)


def no_text_field(where: str, fields: Sequence[str], options: ReadOptions) -> UsageError:
    """What to say of an input in which no record has the text field."""
    found = ", ".join(fields[:20]) or "none"
    return UsageError(f"{where}: no field {options.text_column!r} (found: {found}); name the text with --text-column")


def no_id_field(where: str, fields: Sequence[str], options: ReadOptions) -> UsageError:
    """What to say of an input in which no record has the id field that was asked for."""
    found = ", ".join(fields[:20]) or "none"
    return UsageError(f"{where}: no field {options.id_column!r} (found: {found}); mend --id-column")


def is_unicode(text: str) -> bool:
    """False for lone surrogates, which no UTF-8 file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    return text.encode(errors="replace").decode()
