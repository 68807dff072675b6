"""Reads input files of all formats as documents.

A reader is a function that takes a file and the options and yields documents; ``_READERS`` has one for each format. For
a record that cannot be read it yields a document with a fault; for a file that cannot be read it raises UsageError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from nermill.producer.sources.conll import read_conll
from nermill.producer.sources.delimited import read_delimited
from nermill.producer.sources.detect import UnknownFormatError, empty, format_of, is_documentation
from nermill.producer.sources.files import SourceFile, find_files
from nermill.producer.sources.json_array import read_json_array
from nermill.producer.sources.jsonl import read_jsonl
from nermill.producer.sources.options import FORMATS, Format, OnError, ReadOptions, Unit
from nermill.producer.sources.text import read_text
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import UsageError

__all__ = ["FORMATS", "Format", "Inputs", "OnError", "ReadOptions", "Source", "SourceFile", "Unit", "open_sources"]

Reader = Callable[[SourceFile, ReadOptions], Iterator[Document]]


def _read_parquet(file: SourceFile, options: ReadOptions) -> Iterator[Document]:
    from nermill.producer.sources.parquet import read_parquet  # importing pyarrow takes time

    return read_parquet(file, options)


_READERS: dict[Format, Reader] = {
    "jsonl": read_jsonl,
    "json": read_json_array,
    "csv": partial(read_delimited, format_="csv"),
    "tsv": partial(read_delimited, format_="tsv"),
    "parquet": _read_parquet,
    "conll": read_conll,
    "text": read_text,
}


@dataclass(frozen=True)
class Source:
    """An input file and its format."""

    file: SourceFile
    format: Format

    def documents(self, options: ReadOptions) -> Iterator[Document]:
        """The file's documents, in order.

        Raises:
            UsageError: the file cannot be read, is empty, or has only malformed records; or a record cannot be read and
                ``options.on_error`` is ``fail``. The message names file and line.
        """
        first: Document | None = None
        is_malformed = True
        for document in _READERS[self.format](self.file, options):
            first = first or document
            is_malformed &= document.fault is not None and document.fault.reason == "malformed"
            if document.fault is not None and options.on_error == "fail":
                raise UsageError(f"{self._located_fault(document)}; correct it, or leave it out with --on-error reject")
            yield document
        if first is None:
            raise empty(self.file)
        if is_malformed:
            raise UsageError(
                f"{self._located_fault(first)}; no record of the file can be read: is it {self.format}? Say --format"
            )

    def _located_fault(self, document: Document) -> str:
        """A document's fault and its position in the file."""
        assert document.fault is not None
        message = document.fault.message
        return message if message.startswith(f"{self.file.uri}:") else f"{document.id}: {message}"


@dataclass(frozen=True)
class Inputs:
    """The files that the arguments stand for.

    Attributes:
        sources: The files that are read, in order.
        left_out: The files that are not read, each with the reason.
    """

    sources: list[Source]
    left_out: list[str]


def open_sources(inputs: Sequence[str], options: ReadOptions) -> Inputs:
    """Finds the input files and the format of each.

    Two kinds of files are left out: documentation (README.md, LICENSE ...) where there are other files, even if it was
    named, since a file name cannot be distinguished from a pattern that the shell expanded; and files of unknown format
    in a folder.

    Raises:
        UsageError: a file is missing or empty, its format is unknown, or it differs from others in its folder.
    """
    files = find_files(inputs)
    data = [file for file in files if not is_documentation(file)] or files
    left_out = [f"{file.uri} (documentation)" for file in files if file not in data]
    sources: list[Source] = []
    unknown: UnknownFormatError | None = None
    for file in data:
        try:
            sources.append(Source(file, format_of(file, options)))
        except UnknownFormatError as error:
            if not file.in_folder:
                raise
            unknown = unknown or error
            left_out.append(str(error).partition("; ")[0])
    if unknown is not None and not sources:
        raise unknown
    for one, other in pairwise(sources):
        if one.file.in_folder and one.file.given == other.file.given and one.format != other.format:
            raise UsageError(
                f"{one.file.given}: mixed formats ({one.file.uri} {one.format}, {other.file.uri} {other.format}); "
                "name one kind with a glob, or say --format"
            )
    return Inputs(sources, left_out)
