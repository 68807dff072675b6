"""Files become documents: one stream, whatever the format, the compression or the place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nermill.producer.sources.conll import looks_like_conll, read_conll
from nermill.producer.sources.files import SourceFile, find_files
from nermill.producer.sources.jsonl import read_jsonl
from nermill.producer.sources.options import FORMATS, Format, ReadOptions, Unit
from nermill.producer.sources.text import read_text
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import UsageError

__all__ = ["FORMATS", "Format", "ReadOptions", "Source", "SourceFile", "Unit", "open_sources"]

_HEAD = 1 << 16
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".conll": "conll",
    ".conll03": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".bio": "conll",
    ".bioes": "conll",
}
_COMPRESSED = (".gz", ".zst", ".zstd")


@dataclass(frozen=True)
class Source:
    """An input file and the format it is in."""

    file: SourceFile
    format: Format

    def documents(self, options: ReadOptions) -> Iterator[Document]:
        """Its documents, one by one, in its order.

        Raises:
            UsageError: the file as a whole is wrong; the message names file and line.
        """
        empty = True
        for document in self._read(options):
            empty = False
            yield document
        if empty:
            raise _empty(self.file)

    def _read(self, options: ReadOptions) -> Iterator[Document]:
        if self.format == "parquet":
            from nermill.producer.sources.parquet import read_parquet  # pyarrow takes its time to import

            return read_parquet(self.file, options)
        readers = {"jsonl": read_jsonl, "conll": read_conll, "text": read_text}
        return readers[self.format](self.file, options)


def open_sources(inputs: Sequence[str], options: ReadOptions) -> list[Source]:
    """Finds the inputs and the format of each.

    Raises:
        UsageError: a file that is missing, empty, of no known format, or of another format than its folder.
    """
    sources = [Source(file, _format_of(file, options)) for file in find_files(inputs)]
    for one, other in pairwise(sources):
        if one.file.given == other.file.given and one.format != other.format:
            raise UsageError(
                f"{one.file.given}: mixed formats ({one.file.uri} {one.format}, {other.file.uri} {other.format}); "
                "name one kind with a glob, or say --format"
            )
    return sources


def _format_of(file: SourceFile, options: ReadOptions) -> Format:
    with file.open() as stream:
        head = stream.read(_HEAD).removeprefix(b"\xef\xbb\xbf")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UsageError(f"{file.uri}: UTF-16 text; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
    by_suffix = _suffix_format(file.uri)
    found = options.format or by_suffix or _sniff(head, file.uri)
    if not head.strip() and (file.is_named or found != "text" or options.lines):
        raise _empty(file)
    return found


def _suffix_format(uri: str) -> Format | None:
    name = uri.rsplit("/", 1)[-1].lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return next((found for suffix, found in _SUFFIXES.items() if name.endswith(suffix)), None)


def _sniff(head: bytes, uri: str) -> Format:
    if head.startswith(b"PAR1"):
        return "parquet"
    if b"\0" in head[:4096]:
        raise UsageError(f"{uri}: neither JSONL, CoNLL, text nor Parquet; say --format {'|'.join(FORMATS)} if it is")
    start = head.lstrip()
    if start.startswith((b'{"', b"{ ", b"{}")):
        return "jsonl"
    if start.startswith(b"[{"):
        raise UsageError(f"{uri}:1: a JSON array; write one object a line (jq -c '.[]')")
    lines = head.decode(errors="replace").splitlines()
    complete = lines if len(head) < _HEAD else lines[:-1]
    return "conll" if looks_like_conll(complete[:50]) else "text"


def _empty(file: SourceFile) -> UsageError:
    return UsageError(f"{file.uri}: the file is empty; name a file with documents, or leave it out")
