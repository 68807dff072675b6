"""Reads plain text; a document is a file or, with ``--lines``, a line."""

from __future__ import annotations

from collections.abc import Iterator

from nermill.producer.sources.files import SourceFile
from nermill.producer.sources.options import ReadOptions, not_utf8, reject, text_document
from nermill.worker.contracts.content import BOM, MAX_LINE_BYTES
from nermill.worker.contracts.document import Document


def read_text(file: SourceFile, options: ReadOptions) -> Iterator[Document]:
    """The documents of a plain text file: the file, with its path as id, or its lines that are not blank."""
    if not options.lines:
        with file.open() as stream:
            yield _decode(stream.read(MAX_LINE_BYTES + 1).removeprefix(BOM), file.uri)
        return
    for number, line in file.lines():
        if line is None or line.strip():
            yield _decode(line, f"{file.uri}:{number}")


def _decode(raw: bytes | None, identity: str) -> Document:
    if raw is None or len(raw) > MAX_LINE_BYTES:
        return reject(identity, identity, "too_large", f"longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        return text_document(identity, raw.decode())
    except UnicodeDecodeError as error:
        return not_utf8(identity, identity, error)
