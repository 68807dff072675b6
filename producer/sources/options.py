"""Options of the readers, and the faults and errors that several readers share."""

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
        format: Format of all files; ``None`` detects it for each file.
        unit: What a document of a CoNLL file is: a sentence, or the sentences between ``-DOCSTART-`` or ``# newdoc``.
        id_column: Field or column of the id; a record without it has the id ``path:line``. Where the name is not the
            default, a file in which no record has the field is refused.
        text_column: Field or column of the text, or of a list of words. Where the name is the default, records may have
            ``tokens`` or ``words`` instead.
        keep_fields: Whether the other fields of a record are written into the parts.
        lines: Whether each line of a plain text is a document.
        on_error: What happens for a record that cannot be read: it is rejected (``reject``), or nothing is written
            (``fail``).
        delimiter: Character between the fields of a CSV or TSV file; empty detects it.
        word_column, tag_column: Columns of a CoNLL file, from 1, or negative from the end; None searches for them.
        tag_names: Names of tags that are given as numbers, by number; empty takes the names in a Parquet file.
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
    """A document that cannot be tagged.

    Args:
        identity: Its id.
        where: ``path:line``; added to the message where the id does not say it.
        reason: Reason for programs.
        message: What is wrong.
    """
    located = message if identity == where else f"{where}: {message}"
    return Document(printable(identity), fault=Fault(reason, located))


def text_document(identity: str, text: str, fields: dict[str, Any] | None = None, where: str = "") -> Document:
    """A document, or a reject where the text is empty or has lone surrogates."""
    if not text.strip():
        return reject(identity, where or identity, "empty", "the text is empty")
    if not is_unicode(text):
        return reject(identity, where or identity, "not_utf8", "the text has lone surrogates")
    return Document(identity, text=text, fields=fields)


def not_utf8(identity: str, where: str, error: UnicodeDecodeError) -> Document:
    """The reject of a document whose bytes are not UTF-8."""
    return reject(identity, where, "not_utf8", f"not UTF-8 (byte {error.object[error.start]:#04x})")


def no_text_field(where: str, fields: Sequence[str], options: ReadOptions) -> UsageError:
    """The error for a file in which no record has the text field."""
    found = printable(", ".join(fields[:20])) or "none"
    return UsageError(f"{where}: no field {options.text_column!r} (found: {found}); name the text with --text-column")


def no_id_field(where: str, fields: Sequence[str], options: ReadOptions) -> UsageError:
    """The error for a file in which no record has the id field of the options."""
    found = printable(", ".join(fields[:20])) or "none"
    return UsageError(f"{where}: no field {options.id_column!r} (found: {found}); name the id with --id-column")


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8: it has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """The text with lone surrogates replaced by ``?``."""
    return text.encode(errors="replace").decode()
