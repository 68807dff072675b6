"""Reads the content of an input file: decompresses it, limits its expansion, splits it into numbered lines."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from nermill.worker.contracts.errors import UsageError

COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
MAX_LINE_BYTES = 32 << 20
MAX_EXPANSION = 1000  # most decompressed bytes for each compressed byte, in a file of more than BOMB_BYTES
BOMB_BYTES = 1 << 30  # decompressed
BLOCK = 1 << 20
BOM = b"\xef\xbb\xbf"

_GZIP, _ZSTD, _BZIP2, _XZ = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\0"


def open_content(raw: BinaryIO, uri: str) -> BinaryIO:
    """A file's content, decompressed where its first bytes are those of gzip, Zstandard, bzip2 or xz.

    Args:
        raw: The stored bytes, seekable; closed with the content, or when opening fails.
        uri: The file's name in messages.

    Raises:
        UsageError: the file cannot be read. Reading raises it too, for data that are damaged or expand too much.
    """
    try:
        return cast(BinaryIO, io.BufferedReader(_Content(raw, uri), BLOCK))
    except BaseException:
        raw.close()
        raise


def numbered_lines(stream: BinaryIO, *, keep_ends: bool = False) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a stream, numbered from 1, without a byte order mark.

    Args:
        stream: UTF-8 text, or any bytes.
        keep_ends: Whether lines keep their line ends.

    Yields:
        Number and bytes of each line; None in the place of the bytes for a line longer than MAX_LINE_BYTES.
    """
    number = 0
    while line := stream.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(BLOCK)) and not rest.endswith(b"\n"):
                pass
            yield number, None
            continue
        if number == 1:
            line = line.removeprefix(BOM)
        yield number, line if keep_ends else line.removesuffix(b"\n").removesuffix(b"\r")


def unreadable(uri: str, error: Exception) -> UsageError:
    """The error for a file that the disk or the store does not return.

    Args:
        uri: The file.
        error: What the disk or the store raised.
    """
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UsageError(f"{uri}: cannot be read ({reason}); check the path and its permissions")


class _Content(io.RawIOBase):
    """Decompresses stored bytes while they are read, and refuses decompression bombs."""

    def __init__(self, raw: BinaryIO, uri: str) -> None:
        self._raw, self._uri, self._given = raw, uri, 0
        try:
            magic = raw.read(6)
            raw.seek(0)
        except OSError as error:
            raise unreadable(uri, error) from None
        stream = _decompressor(raw, magic)
        self._packed = stream is not None
        self._stream: Any = stream or raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            block = self._stream.read(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError) as error:
            if self._packed and not getattr(error, "errno", None):
                raise UsageError(
                    f"{self._uri}: compressed data damaged or cut short ({error}); copy or compress it again"
                ) from None
            raise unreadable(self._uri, error) from None
        self._given += len(block)
        if self._packed and self._given > BOMB_BYTES and self._given > MAX_EXPANSION * max(1, self._raw.tell()):
            raise UsageError(
                f"{self._uri}: expands more than {MAX_EXPANSION} times; decompress it yourself if you trust it"
            )
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._raw.close()
        super().close()


def _decompressor(raw: BinaryIO, magic: bytes) -> Any:
    if magic.startswith(_GZIP):
        return gzip.GzipFile(fileobj=raw)
    if magic.startswith(_ZSTD):
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(cast(io.IOBase, raw), mode="r"), "zstd")
    if magic.startswith(_BZIP2):
        return bz2.BZ2File(raw)
    if magic.startswith(_XZ):
        return lzma.LZMAFile(raw)
    return None
