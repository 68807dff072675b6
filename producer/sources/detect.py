"""Detects the format of a file by its suffix, or by its content; an unknown format is never taken to be plain text."""

from __future__ import annotations

import csv
import re

from nermill.producer.sources.files import SourceFile
from nermill.producer.sources.options import FORMATS, KNOWN, Format, ReadOptions
from nermill.producer.sources.record import WORDS_FIELDS
from nermill.worker.contracts.conll import looks_like_conll
from nermill.worker.contracts.content import BOM, COMPRESSED
from nermill.worker.contracts.errors import UsageError

_HEAD = 1 << 16
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".conll": "conll",
    ".conllu": "conll",
    ".conll03": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".bio": "conll",
    ".bioes": "conll",
}
_TABS = (".tsv", ".tab")  # a table, or CoNLL
_TEXTS = (".txt", ".md", ".text", ".markdown")  # plain text, unless the content is clearly of another format
_DOCUMENTATION = re.compile(
    r"(readme|licen[cs]e|notice|copying|changelog|changes|citation|authors|contributing)"
    r"([-_ ][^.]*)?(\.(md|txt|rst|cff|html|markdown))?",
    re.IGNORECASE,
)
_TABLE_LINES = 20


class UnknownFormatError(UsageError):
    """A file whose format is unknown."""


def is_documentation(file: SourceFile) -> bool:
    """Whether a file's name is that of documentation, such as README.md or LICENSE."""
    return _DOCUMENTATION.fullmatch(file.uri.rsplit("/", 1)[-1]) is not None


def format_of(file: SourceFile, options: ReadOptions) -> Format:
    """The format of a file.

    Raises:
        UsageError: the file cannot be read, is empty, or has an unknown format.
    """
    with file.open() as stream:
        head = stream.read(_HEAD).removeprefix(BOM)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UsageError(f"{file.uri}: UTF-16 text; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
    suffix = _suffix(file.uri)
    is_text = options.format == "text" or (options.format is None and suffix in _TEXTS)
    if not head.strip() and (file.is_named or not is_text or options.lines):
        raise empty(file)
    return options.format or _SUFFIXES.get(suffix) or _by_content(head, suffix, file.uri)


def empty(file: SourceFile) -> UsageError:
    """The error for a file without documents."""
    return UsageError(f"{file.uri}: the file is empty; name a file with documents, or leave it out")


def _suffix(uri: str) -> str:
    name = uri.rsplit("/", 1)[-1].lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    stem, dot, suffix = name.rpartition(".")
    return f".{suffix}" if dot and stem else ""


def _by_content(head: bytes, suffix: str, uri: str) -> Format:
    if head.startswith(b"PAR1"):
        return "parquet"
    if b"\0" in head[:4096]:
        raise _unknown(uri, suffix, "it is not text")
    if found := _json_kind(head, uri):
        return found
    lines = head.decode(errors="replace").splitlines()
    complete = lines if len(head) < _HEAD else lines[:-1]
    if looks_like_conll(complete):
        return "conll"
    if suffix in _TABS:
        return "tsv"
    if suffix == ".json":
        raise UsageError(f"{uri}:1: no JSON; a JSON array of objects, or JSONL with one object a line, is wanted")
    if delimiter := _table_delimiter(complete):
        separator = "tabs" if delimiter == "\t" else f"{delimiter!r}"
        raise UsageError(
            f"{uri}: looks like a table with {separator} between its columns; say --format csv, or --format text"
        )
    if suffix not in _TEXTS:
        raise _unknown(uri, suffix, "its content does not show one")
    return "text"


def _json_kind(head: bytes, uri: str) -> Format | None:
    start = head.lstrip()
    if re.match(rb"\[\s*[{\]]", start):
        return "json"
    if re.match(rb'\{\s*("|\})', start):
        first = start.partition(b"\n")[0].strip()
        if first.endswith(b"}") or len(first) >= _HEAD - 1:
            return "jsonl"
        raise UsageError(
            f"{uri}:1: one JSON object over several lines; a JSON array of objects, or JSONL with one object a line, "
            "is wanted (jq -c . makes lines)"
        )
    return None


def _table_delimiter(lines: list[str]) -> str:
    """The delimiter of a text that is clearly a table; empty for other texts."""
    rows = [line for line in lines if line.strip()][:_TABLE_LINES]
    for delimiter in ("\t", ",", ";", "|"):
        table = list(csv.reader(rows, delimiter=delimiter))
        header = [name.strip() for name in table[0]] if table else []
        if len(table) < 2 or len(header) < 2 or any(len(row) != len(header) for row in table):
            continue
        is_named = bool({"text", "id", *WORDS_FIELDS} & {name.lower() for name in header})
        if is_named or (len(table) > 2 and all(re.fullmatch(r"[\w .-]{1,40}", name) for name in header)):
            return delimiter
    return ""


def _unknown(uri: str, suffix: str, why: str) -> UnknownFormatError:
    named = f"the suffix {suffix} is of no known format" if suffix else "no suffix says its format"
    return UnknownFormatError(f"{uri}: {named}, and {why}; known are {KNOWN}; say --format {'|'.join(FORMATS)}")
