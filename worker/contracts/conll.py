"""Reads CoNLL columns, for inputs and for gold files: one word a line, a blank line after each sentence.

``find_layout`` finds a file's columns from its first lines: the separator, leading columns with word numbers, the
columns of words and tags. ``read_sentences`` then reads the whole file once. A sentence with a line that cannot be read
has a ``fault``; the other sentences are not affected.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from nermill.worker.contracts.document import Fault
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.tags import OUTSIDE, Scheme, detect_scheme, is_tag, merge_schemes, to_iob2

DOCSTART = "-DOCSTART-"
MAX_DOCUMENT_WORDS = 1_000_000
LAYOUT_LINES = 1000  # lines from which a file's layout is found

_BLANKS = re.compile(r"[ \t]+")
_NO_WORD = re.compile(r"\d+-\d+|\d+\.\d+")  # CoNLL-U: a range of words that are written as one, and an empty node
_COMMENT = re.compile(r"#\s*(sent_id|newdoc)(?:\s+id)?(?:\s*=\s*(.*))?")
_WEBANNO = "#FORMAT=WebAnno"


@dataclass(frozen=True)
class Layout:
    """The columns of a file, numbered from 0.

    Attributes:
        tabs: Whether cells are separated by single tabs and may contain blanks; else by runs of blanks and tabs.
        columns: Number of cells in a line.
        word: Column of the words.
        tag: Column of the tags; None where the file has none.
        number_column: Column of the word's number in its sentence; None where there is none.
    """

    tabs: bool
    columns: int
    word: int
    tag: int | None
    number_column: int | None = None


@dataclass
class Sentence:
    """A sentence, or all sentences of one document.

    Attributes:
        line: Line number of the first word.
        words: The words.
        tags: An IOB2 tag for each word; empty where the file has no tags.
        lines: Line number of each word.
        scheme: Scheme in which the tags were written, as far as these tags show it.
        id: Value of ``# sent_id``, or for a document of ``# newdoc id``; empty where there is none.
        opens_document: Whether ``-DOCSTART-`` or ``# newdoc`` comes before it.
        document_id: Value of that ``# newdoc id``; empty where there is none.
        fault: Why it cannot be used, with file and line; None where it can.
    """

    line: int = 0
    words: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    scheme: Scheme = "IOB2"
    id: str = ""
    opens_document: bool = False
    document_id: str = ""
    fault: Fault | None = None


def find_layout(lines: Sequence[str], name: str, word: int | None = None, tag: int | None = None) -> Layout:
    """Finds the columns of a file.

    Args:
        lines: The file's first lines; LAYOUT_LINES are enough.
        name: The file's name in messages.
        word: Column of the words, from 1, or negative from the end; None searches for it.
        tag: Column of the tags, likewise; None searches for it, and a file of one column has none.

    Raises:
        UsageError: no column holds tags, there is no such column, or the file is WebAnno TSV.
    """
    sample = _Sample(lines)
    if sample.is_webanno:
        raise UsageError(f"{name}: a WebAnno TSV file; export CoNLL 2002 or CoNLL-U from WebAnno or INCEpTION instead")
    columns = sample.columns
    if not columns:
        return Layout(sample.tabs, 1, 0, None)
    number_column = sample.number_column()
    at_word = _column("--word-column", word, columns, name)
    at_tag = _column("--tag-column", tag, columns, name)
    if at_word is None:
        at_word = 0 if number_column is None else min(number_column + 1, columns - 1)
    if at_tag is None:
        at_tag = sample.tag_column(at_word, number_column)
        if at_tag is None and word is None and number_column is None and columns > 1:
            raise UsageError(
                f"{name}:{sample.first}: {columns} columns, and none holds tags (O, B-PER, I-PER ...); name the "
                "columns: --word-column N --tag-column N, or --word-column N for words alone; or name another --format"
            )
    if at_tag == at_word:
        raise UsageError(f"{name}: words and tags cannot both be in column {at_word + 1}; change --word-column")
    return Layout(sample.tabs, columns, at_word, at_tag, number_column)


def looks_like_conll(lines: Sequence[str]) -> bool:
    """Whether a file's first lines have a column with tags, or the ten columns of CoNLL-U."""
    sample = _Sample(lines)
    if sample.is_webanno or sample.has_docstart:
        return True
    number_column = sample.number_column()
    if not sample.is_even or sample.columns < 2:
        return False
    word = 0 if number_column is None else number_column + 1
    return sample.tag_column(word, number_column) is not None or (number_column == 0 and sample.columns == 10)


def read_sentences(lines: Iterable[tuple[int, bytes | None]], layout: Layout, name: str) -> Iterator[Sentence]:
    """The sentences of a file; the blank line after the last one may be missing.

    Args:
        lines: Numbered lines without their line ends; None for a line that is too long.
        layout: The file's columns.
        name: The file's name in messages.
    """
    sentence, upcoming = Sentence(), Sentence()  # upcoming: holds what comments say about the next sentence
    for number, raw in lines:
        line = "" if raw is None else raw.decode(errors="replace").rstrip(" \t")
        cells = _cells(line, layout.tabs)
        if raw is not None and (not line or cells[0] == DOCSTART):
            if sentence.lines:
                yield _normalised(sentence, name)
                sentence = Sentence()
            if line:
                upcoming.opens_document, upcoming.document_id = True, ""
            continue
        if line.startswith("#") and _is_comment(cells, layout):
            _read_comment(line, upcoming)
            continue
        if (
            layout.number_column is not None
            and len(cells) > layout.number_column
            and _NO_WORD.fullmatch(cells[layout.number_column])
        ):
            continue
        if not sentence.lines:
            sentence, upcoming = upcoming, Sentence()
            sentence.line = number
        fault = _add_word(sentence, raw, line, cells, layout)
        sentence.lines += [number] * (len(sentence.words) - len(sentence.lines))
        if fault and sentence.fault is None:
            sentence.fault = Fault(fault.reason, f"{name}:{number}: {fault.message}")
    if sentence.lines:
        yield _normalised(sentence, name)


def join_documents(sentences: Iterable[Sentence], name: str) -> Iterator[Sentence]:
    """Joins the sentences between ``-DOCSTART-`` or ``# newdoc`` lines to documents.

    Args:
        sentences: As ``read_sentences`` yields them.
        name: The file's name in messages.

    Raises:
        UsageError: a document has more than MAX_DOCUMENT_WORDS words.
    """
    document: Sentence | None = None
    for sentence in sentences:
        if document is None or sentence.opens_document:
            if document is not None:
                yield document
            document = sentence
            document.id = sentence.document_id
            continue
        document.words += sentence.words
        document.tags += sentence.tags
        document.lines += sentence.lines
        document.scheme = merge_schemes(document.scheme, sentence.scheme)
        document.fault = document.fault or sentence.fault
        if len(document.words) > MAX_DOCUMENT_WORDS:
            raise UsageError(
                f"{name}:{document.line}: more than {MAX_DOCUMENT_WORDS:,} words, no {DOCSTART}; use --unit sentence"
            )
    if document is not None:
        yield document


class _Sample:
    """The first lines of a file as cells, without comments, and the properties that they share."""

    def __init__(self, lines: Sequence[str]) -> None:
        lines = [line.rstrip(" \t\r\n") for line in lines[:LAYOUT_LINES]]
        self.is_webanno = bool(lines) and lines[0].startswith(_WEBANNO)
        self.has_docstart = any(line.startswith(DOCSTART) for line in lines[:50])
        bare = [line for line in lines if line and not line.startswith(("#", DOCSTART))]
        self.tabs = 2 * sum("\t" in line for line in bare) >= max(1, len(bare))
        widths = Counter(len(_cells(line, self.tabs)) for line in bare)
        self.columns = widths.most_common(1)[0][0] if widths else 0
        self.is_even = len(widths) == 1
        self.sentences: list[list[list[str]]] = [[]]
        self.first = next((number for number, line in enumerate(lines, 1) if line and line in bare[:1]), 1)
        for line in lines:
            cells = _cells(line, self.tabs)
            if not line or cells[0] == DOCSTART:
                self.sentences.append([])
            elif len(cells) == self.columns and not line.startswith("# "):
                self.sentences[-1].append(cells)

    def number_column(self) -> int | None:
        """The column that numbers the words of each sentence from 0 or 1; of several leading ones, the last."""
        found = None
        for column in range(self.columns - 1):
            numbers = [[row[column] for row in rows] for rows in self.sentences if rows]
            if not numbers or not all(_NO_WORD.fullmatch(n) or n.isdecimal() for rows in numbers for n in rows):
                break
            if all(_counts([n for n in rows if not _NO_WORD.fullmatch(n)]) for rows in numbers):
                found = column
        return found

    def tag_column(self, word: int, number_column: int | None) -> int | None:
        """The column of tags: the one after the words where words are numbered, else the last that holds tags."""
        rows = [row for rows in self.sentences for row in rows]
        holding = [column for column in range(self.columns) if column != word and _holds_tags(rows, column)]
        if number_column is not None and word + 1 in holding:
            return word + 1
        return holding[-1] if holding else None


def _counts(numbers: list[str]) -> bool:
    first = int(numbers[0]) if numbers else 0
    return first in (0, 1) and [int(number) for number in numbers] == [*range(first, first + len(numbers))]


def _holds_tags(rows: list[list[str]], column: int) -> bool:
    """Whether more than half of the cells are tags, and more than half of those that are not ``O``.

    All of them need not be: a mistyped tag is reported when the sentence is read.
    """
    cells = [row[column] for row in rows]
    inside = [cell for cell in cells if cell != OUTSIDE]
    good = sum(map(is_tag, inside))
    return 2 * (len(cells) - len(inside) + good) > len(cells) and (2 * good > len(inside) or not inside)


def _column(flag: str, number: int | None, columns: int, name: str) -> int | None:
    if number is None:
        return None
    at = number - 1 if number > 0 else columns + number
    if not 0 <= at < columns or number == 0:
        raise UsageError(
            f"{name}: its lines have {columns} columns, {flag} says {number}; count from 1, or back from -1"
        )
    return at


def _cells(line: str, tabs: bool) -> list[str]:
    return [cell.strip(" ") for cell in line.split("\t")] if tabs else _BLANKS.split(line)


def _is_comment(cells: list[str], layout: Layout) -> bool:
    """Whether a line that begins with ``#`` is a comment: it lacks the columns or the tag of a row."""
    if len(cells) != layout.columns:
        return True
    return layout.tag is not None and not is_tag(cells[layout.tag])


def _read_comment(line: str, upcoming: Sentence) -> None:
    if match := _COMMENT.fullmatch(line):
        key, value = match[1], (match[2] or "").strip()
        if key == "newdoc":
            upcoming.opens_document, upcoming.document_id = True, value
        else:
            upcoming.id = value


def _add_word(sentence: Sentence, raw: bytes | None, line: str, cells: list[str], layout: Layout) -> Fault | None:
    """Adds a line's word and tag to its sentence; returns the line's fault, if it has one."""
    if raw is not None and len(cells) == layout.columns and (word := cells[layout.word]):
        sentence.words.append(word)
        sentence.tags += [] if layout.tag is None else [cells[layout.tag]]
        return None if "\ufffd" not in line or _is_utf8(raw) else Fault("not_utf8", "not UTF-8")
    sentence.words.append("")
    sentence.tags += [] if layout.tag is None else [OUTSIDE]
    if raw is None:
        return Fault("too_large", "a line too long for CoNLL")
    if len(cells) == layout.columns:
        return Fault("empty", "an empty word")
    noun = "column" if len(cells) == 1 else "columns"
    return Fault("malformed", f"{len(cells)} {noun} where the file has {layout.columns}")


def _normalised(sentence: Sentence, name: str) -> Sentence:
    """The sentence with its tags as IOB2."""
    for line, tag in zip(sentence.lines, sentence.tags, strict=False):
        if not is_tag(tag):
            message = f"the tag {tag!r} is of no known scheme; write IOB1, IOB2 or BIOES (O, B-PER, I-PER ...)"
            sentence.fault = sentence.fault or Fault("malformed", f"{name}:{line}: {message}")
            return sentence
    sentence.scheme = detect_scheme([sentence.tags])
    sentence.tags = list(to_iob2(sentence.tags, "BIOES"))  # its rules include those of the other schemes
    return sentence


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True
