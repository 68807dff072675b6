"""CoNLL columns (word … tag, four or two of them), their tags normalised to IOB2."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from nermill.producer.sources.files import SourceFile
from nermill.producer.sources.options import ReadOptions
from nermill.worker.contracts.document import Document, Fault
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.tags import Scheme, detect_scheme, to_iob2

DOCSTART = "-DOCSTART-"
COLUMNS = (4, 2)
MAX_DOCUMENT_WORDS = 1_000_000

_SEPARATOR = re.compile(r"[ \t]+")


@dataclass
class _Block:
    """Consecutive lines of words: a sentence, or the sentences of one document."""

    line: int
    words: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    opens_document: bool = False
    is_damaged: bool = False


def read_conll(file: SourceFile, options: ReadOptions) -> Iterator[Document]:
    """The sentences or documents of a CoNLL file; it is read twice, for the tag scheme shows only in the whole.

    Raises:
        UsageError: a line with another number of columns, or tags of no known scheme.
    """
    scheme = _scheme(file)
    blocks = _sentences(file, scheme)
    if options.unit == "document":
        blocks = _documents(blocks, file.uri)
    for block in blocks:
        identity = f"{file.uri}:{block.line}"
        if block.is_damaged:
            yield Document(identity, fault=Fault("not_utf8", "a line of it is not UTF-8"))
        else:
            yield Document(identity, words=tuple(block.words), gold_tags=tuple(block.tags))


def looks_like_conll(lines: list[str]) -> bool:
    """Whether a file's first lines are columns that end in a tag."""
    rows = [_SEPARATOR.split(line.strip(" \t")) for line in lines if line.strip()]
    rows = [row for row in rows if row[0] != DOCSTART] or rows
    if not rows or len(rows[0]) not in COLUMNS or any(len(row) != len(rows[0]) for row in rows):
        return rows != [] and rows[0][0] == DOCSTART
    try:
        detect_scheme([[row[-1]] for row in rows])
    except ValueError:
        return False
    return True


def _scheme(file: SourceFile) -> Scheme:
    current = _Block(0)

    def tags() -> Iterator[list[str]]:
        nonlocal current
        for current in _blocks(file):
            if not current.is_damaged:
                yield current.tags

    try:
        return detect_scheme(tags())
    except ValueError:
        for offset, tag in enumerate(current.tags):
            try:
                detect_scheme([[tag]])
            except ValueError:
                where = f"{file.uri}:{current.line + offset}"
                raise UsageError(
                    f"{where}: the tag {tag!r} is of no known scheme; write IOB1, IOB2 or BIOES (O, B-PER, I-PER ...)"
                ) from None
        raise


def _sentences(file: SourceFile, scheme: Scheme) -> Iterator[_Block]:
    for block in _blocks(file):
        if not block.is_damaged:
            block.tags = list(to_iob2(block.tags, scheme))
        yield block


def _documents(sentences: Iterator[_Block], uri: str) -> Iterator[_Block]:
    document: _Block | None = None
    for sentence in sentences:
        if document is None or sentence.opens_document:
            if document is not None:
                yield document
            document = sentence
            continue
        document.words += sentence.words
        document.tags += sentence.tags
        document.is_damaged |= sentence.is_damaged
        if len(document.words) > MAX_DOCUMENT_WORDS:
            raise UsageError(
                f"{uri}:{document.line}: more than {MAX_DOCUMENT_WORDS:,} words, no {DOCSTART}; use --unit sentence"
            )
    if document is not None:
        yield document


def _blocks(file: SourceFile) -> Iterator[_Block]:
    """Sentences as they stand in the file; a last one without its blank line counts."""
    block, columns, opens_document = _Block(0), 0, False
    for number, raw in file.lines():
        if raw is None:
            raise UsageError(f"{file.uri}:{number}: a line too long for CoNLL; name another --format")
        line = raw.decode(errors="replace").strip(" \t")
        row = _SEPARATOR.split(line) if line else []
        if not row or row[0] == DOCSTART:
            if block.words:
                yield block
                opens_document = False
            block = _Block(0)
            opens_document |= bool(row)
            continue
        columns = columns or len(row)
        if len(row) not in COLUMNS or len(row) != columns:
            raise UsageError(_wrong_columns(f"{file.uri}:{number}", len(row), columns))
        if not block.words:
            block = _Block(number, opens_document=opens_document)
        block.words.append(row[0])
        block.tags.append(row[-1])
        block.is_damaged |= "\ufffd" in line and not _is_utf8(raw)
    if block.words:
        yield block


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _wrong_columns(where: str, found: int, before: int) -> str:
    noun = "column" if found == 1 else "columns"
    expected = f"the lines before have {before}" if before in COLUMNS else "CoNLL has four (word … tag) or two"
    return f"{where}: {found} {noun} where {expected}; mend the line or name another --format"
