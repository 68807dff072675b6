"""Files become documents: one stream, whatever the format, the compression or the place.

A reader is a function of a file and the options that yields documents; ``_READERS`` names one for each format.
A record that cannot be read is yielded as a document with a fault; what is wrong with a file as a whole is raised.
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
    from nermill.producer.sources.parquet import read_parquet  # pyarrow takes its time to import

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
    """An input file and the format it is in."""

    file: SourceFile
    format: Format

    def documents(self, options: ReadOptions) -> Iterator[Document]:
        """Its documents, one by one, in its order.

        Raises:
            UsageError: the file as a whole is wrong, such as one whose every record is malformed; or a record is and
                ``options.on_error`` says ``fail``. The message names file and line.
        """
        first: Document | None = None
        is_malformed = True
        for document in _READERS[self.format](self.file, options):
            first = first or document
            is_malformed &= document.fault is not None and document.fault.reason == "malformed"
            if document.fault is not None and options.on_error == "fail":
                raise UsageError(f"{self._describe(document)}; mend it, or go on without it: --on-error reject")
            yield document
        if first is None:
            raise empty(self.file)
        if is_malformed:
            raise UsageError(
                f"{self._describe(first)}; no record of the file can be read: is it {self.format}? Say --format"
            )

    def _describe(self, document: Document) -> str:
        """What is wrong with a document, and where."""
        assert document.fault is not None
        told = document.fault.message
        return told if told.startswith(f"{self.file.uri}:") else f"{document.id}: {told}"


@dataclass(frozen=True)
class Inputs:
    """What the arguments led to.

    Attributes:
        sources: The files that are read, in order.
        left_out: The files that are not, each with the reason.
    """

    sources: list[Source]
    left_out: list[str]


def open_sources(inputs: Sequence[str], options: ReadOptions) -> Inputs:
    """Finds the inputs and the format of each.

    Left out are documentation (README.md, LICENSE ...) beside data, however it was named, for a shell's pattern is not
    to be told from names; and files of no known format in a folder.

    Raises:
        UsageError: a file that is missing, empty, of no known format, or of another format than its folder.
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
