"""How inputs are to be read, and what every reader says of a bad record in the same words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nermill.worker.contracts.document import Document, Fault, Reason
from nermill.worker.contracts.errors import UsageError

Format = Literal["jsonl", "json", "csv", "tsv", "parquet", "conll", "text"]
Unit = Literal["sentence", "document"]
OnError = Literal["reject", "fail"]
FORMATS: tuple[Format, ...] = ("jsonl", "json", "csv", "tsv", "parquet", "conll", "text")
KNOWN = "JSONL, JSON, CSV, TSV, Parquet, CoNLL, text (.txt .md)"


@dataclass(frozen=True)
class ReadOptions:
    """How inputs are read.

    Attributes:
        format: ``None`` looks at suffix and content of each file.
        unit: What a document of a CoNLL file is: a sentence, or what stands between ``-DOCSTART-`` or ``# newdoc``.
        id_column: Field or column of the id; a record without one is called ``path:line``. Where it is not the default,
            a file in which no record has it is refused.
        text_column: Field or column of the text, or of a list of words. Records without a field of the default name
            may have ``tokens`` or ``words`` instead.
        keep_fields: Whether the other fields travel along.
        lines: Whether each line of a plain text is a document.
        on_error: What a record that cannot be read costs: itself (``reject``), or the whole run (``fail``).
        delimiter: Between the fields of a CSV or TSV file, one character; empty looks at suffix and header.
        word_column, tag_column: Columns of a CoNLL file, from 1, or negative from the end; None looks for them.
        tag_names: Names of tags that are given as numbers, by number; empty takes a Parquet file's own.
    """

    format: Format | None = None
    unit: Unit = "sentence"
    id_column: str = "id"
    text_column: str = "text"
    keep_fields: bool = False
    lines: bool = False
    on_error: OnError = "reject"
    delimiter: str = ""
    word_column: int | None = None
    tag_column: int | None = None
    tag_names: tuple[str, ...] = ()


def reject(identity: str, where: str, reason: Reason, message: str) -> Document:
    """A document that cannot be tagged; its id or its message says where it stands."""
    told = message if identity == where else f"{where}: {message}"
    return Document(printable(identity), fault=Fault(reason, told))


def text_document(identity: str, text: str, fields: dict[str, Any] | None = None, where: str = "") -> Document:
    """A document, or a reject where its text is empty or no Unicode text at all."""
    if not text.strip():
        return reject(identity, where or identity, "empty", "the text is empty")
    if not is_unicode(text):
        return reject(identity, where or identity, "not_utf8", "the text has lone surrogates")
    return Document(identity, text=text, fields=fields)


def not_utf8(identity: str, where: str, error: UnicodeDecodeError) -> Document:
    """The reject of a document whose bytes are not UTF-8."""
    return reject(identity, where, "not_utf8", f"not UTF-8 (byte {error.object[error.start]:#04x})")


def no_text_field(where: str, fields: Sequence[str], options: ReadOptions) -> UsageError:
    """What to say of an input in which no record has the text field."""
    found = printable(", ".join(fields[:20])) or "none"
    return UsageError(f"{where}: no field {options.text_column!r} (found: {found}); name the text with --text-column")


def no_id_field(where: str, fields: Sequence[str], options: ReadOptions) -> UsageError:
    """What to say of an input in which no record has the id field that was asked for."""
    found = printable(", ".join(fields[:20])) or "none"
    return UsageError(f"{where}: no field {options.id_column!r} (found: {found}); mend --id-column")


def is_unicode(text: str) -> bool:
    """False for lone surrogates, which no UTF-8 file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """Text with ``?`` for lone surrogates."""
    return text.encode(errors="replace").decode()
