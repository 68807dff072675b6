"""A JSON array of objects, read one object at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from nermill.producer.sources.files import SourceFile
from nermill.producer.sources.options import ReadOptions
from nermill.producer.sources.record import Records
from nermill.worker.contracts import content
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import UsageError

_SPACE = re.compile(r"[ \t\r\n]*")


def read_json_array(file: SourceFile, options: ReadOptions) -> Iterator[Document]:
    """The documents of a JSON array.

    Raises:
        UsageError: the file is no JSON array of objects, or is invalid JSON somewhere, after which nothing can be read;
            or no object has the text field or the id field of the options.
    """
    records = Records(options)
    for line, record in _elements(file):
        yield records.document(record, f"{file.uri}:{line}")
    records.check()


def _elements(file: SourceFile) -> Iterator[tuple[int, object]]:
    """The elements of the array, each with its first line."""
    decoder = json.JSONDecoder(parse_constant=lambda _: None)
    with file.open() as stream:
        text = _Text(stream, file.uri)
        if text.next() != "[":
            raise text.broken("no JSON array; an array of objects, or JSONL with one object a line, is wanted")
        text.skip(1)
        if text.next() == "]":
            text.skip(1)
        else:
            while True:
                text.next()
                line = text.line
                yield line, text.decode(decoder)
                mark = text.next()
                if mark not in (",", "]"):
                    raise text.broken("broken JSON (a comma or the array's end is missing)" if mark else "cut short")
                text.skip(1)
                if mark == "]":
                    break
        if text.next():
            raise text.broken("more after the array's end")


class _Text:
    """A buffer over a stream of UTF-8 text that counts lines."""

    def __init__(self, stream: BinaryIO, uri: str) -> None:
        self._stream, self._uri = stream, uri
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._buffer, self._at, self.line, self._ended = "", 0, 1, False

    def next(self) -> str:
        """The next character that is no white space, without consuming it; empty at the end."""
        while True:
            if space := _SPACE.match(self._buffer, self._at):
                self.skip(space.end() - self._at)
            if self._at < len(self._buffer) or not self._read(content.BLOCK):
                return self._buffer[self._at : self._at + 1]

    def skip(self, characters: int) -> None:
        self.line += self._buffer.count("\n", self._at, self._at + characters)
        self._at += characters

    def decode(self, decoder: json.JSONDecoder) -> object:
        """The value that begins here.

        Raises:
            UsageError: broken JSON, or a value that is too long.
        """
        while True:
            try:
                value, end = decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                waiting = len(self._buffer) - self._at
                if waiting > content.MAX_LINE_BYTES:
                    raise self.broken(f"a value longer than {content.MAX_LINE_BYTES >> 20} MiB") from None
                if not self._read(max(content.BLOCK, waiting)):
                    self.line += self._buffer.count("\n", self._at, error.pos)
                    raise self.broken(f"broken JSON ({error.msg})") from None
                continue
            except RecursionError:
                raise self.broken("nested too deep") from None
            if end == len(self._buffer) and self._read(content.BLOCK):
                continue  # a number may continue
            self.skip(end - self._at)
            return value

    def broken(self, what: str) -> UsageError:
        return UsageError(f"{self._uri}:{self.line}: {what}; correct the file")

    def _read(self, size: int) -> bool:
        if self._ended:
            return False
        block = self._stream.read(size)
        self._ended = not block
        try:
            self._buffer, self._at = self._buffer[self._at :] + self._decode(block, self._ended), 0
        except UnicodeDecodeError as error:
            raise self.broken(f"not UTF-8 (byte {error.object[error.start]:#04x} in this line or behind it)") from None
        return not self._ended
