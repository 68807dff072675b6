"""Finds and opens input files: paths, globs, folders, fsspec URIs, pipes and standard input."""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, BinaryIO, cast

from nermill.worker.contracts.content import BLOCK, numbered_lines, open_content, unreadable
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.store import without_local_scheme

STDIN = "-"


@dataclass(frozen=True)
class SourceFile:
    """One input file.

    Attributes:
        uri: Path or URI; ``-`` is standard input.
        given: The argument that it was found by: the file itself, or a glob or folder.
        in_folder: Whether that argument is a folder.
        spool: Copy of the content of standard input or a pipe, which is read more than once.
    """

    uri: str
    given: str
    in_folder: bool = False
    spool: BinaryIO | None = field(default=None, compare=False)
    _opened: list[BinaryIO] = field(default_factory=list, compare=False, repr=False)

    @property
    def is_named(self) -> bool:
        """Whether the user named this file itself, not a glob or folder."""
        return self.uri == self.given

    def open_raw(self) -> BinaryIO:
        """The file's stored bytes, seekable.

        Raises:
            UsageError: the file is missing or cannot be read.
        """
        self._opened[:] = [self._open_raw()]
        return self._opened[0]

    def position(self) -> int:
        """Position in the stored bytes of the stream that was opened last; 0 once it is closed."""
        return 0 if not self._opened or self._opened[0].closed else self._opened[0].tell()

    def _open_raw(self) -> BinaryIO:
        try:
            if self.spool is not None:
                stream = os.fdopen(os.dup(self.spool.fileno()), "rb")
                stream.seek(0)
                return stream
            if is_remote(self.uri):
                fs, path = filesystem(self.uri)
                return cast(BinaryIO, fs.open(path, "rb"))
            return open(self.uri, "rb")
        except (OSError, ValueError) as error:
            raise unreadable(self.uri, error) from None

    def open(self) -> BinaryIO:
        """The file's content, decompressed.

        Raises:
            UsageError: the file is missing or cannot be read. Reading raises it too, for data that are damaged or
                expand too much.
        """
        return open_content(self.open_raw(), self.uri)

    def fingerprint(self) -> tuple[str, int]:
        """sha256 of the stored bytes, and their number."""
        digest, size = hashlib.sha256(), 0
        with self.open_raw() as stream:
            try:
                while block := stream.read(BLOCK):
                    digest.update(block)
                    size += len(block)
            except OSError as error:
                raise unreadable(self.uri, error) from None
        return digest.hexdigest(), size

    def lines(self, *, keep_ends: bool = False) -> Generator[tuple[int, bytes | None], None, None]:
        """The content as numbered lines; see ``contracts.content.numbered_lines``."""
        with self.open() as stream:
            yield from numbered_lines(stream, keep_ends=keep_ends)


def find_files(inputs: Sequence[str]) -> list[SourceFile]:
    """The files that the arguments stand for, in the order of the arguments; those of a folder or glob are sorted.

    Raises:
        UsageError: there is no such file, or the URI's scheme is unknown.
    """
    if not inputs:
        raise UsageError("no input; name files, folders, globs or URIs, or - for standard input")
    found: dict[str, SourceFile] = {}
    for given in inputs:
        if given == STDIN:
            found[given] = SourceFile(STDIN, STDIN, spool=_spool(STDIN))
            continue
        names = _find_remote(given) if is_remote(given) else _find_local(given)
        in_folder = names != [given] and (os.path.isdir(given) or not glob.has_magic(given))
        for name in names:
            found.setdefault(name, SourceFile(name, given, in_folder, _spool(name) if _is_pipe(name) else None))
    return list(found.values())


def absolute(place: str) -> str:
    """A place as a URI or an absolute path, which does not depend on the working directory."""
    place = without_local_scheme(place)
    return place.rstrip("/") if is_remote(place) else os.path.abspath(place)


def is_remote(uri: str) -> bool:
    return "://" in uri


def filesystem(uri: str) -> tuple[Any, str]:
    """The store that serves a URI, and the path in it.

    Raises:
        UsageError: the scheme is unknown, or the package that serves it is not installed.
    """
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{uri}: {error}; see fsspec's list of stores for the package to install") from None
    return fs, str(path)


@cache
def _spool(name: str) -> BinaryIO:
    """Copies a pipe's content into a temporary file, which is kept until the process ends."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115
    with nullcontext(sys.stdin.buffer) if name == STDIN else open(name, "rb") as stream:
        shutil.copyfileobj(stream, spool, BLOCK)
    spool.flush()
    return cast(BinaryIO, spool)


def _find_local(given: str) -> list[str]:
    if os.path.isdir(given):
        names = [
            os.path.join(folder, name)
            for folder, subfolders, entries in os.walk(given)
            if _keep_visible(subfolders)
            for name in entries
            if not _is_hidden(name)
        ]
        if not names:
            raise UsageError(f"{given}: no files in this folder; name a folder with inputs")
        return sorted(names)
    if os.path.exists(given):
        return [given]
    if glob.has_magic(given):
        names = [name for name in sorted(glob.glob(given, recursive=True)) if os.path.isfile(name)]
        if not names:
            raise UsageError(f"{given}: no file fits this pattern")
        return names
    raise UsageError(f"{given}: no such file or folder{suggestion(given)}")


def _is_pipe(name: str) -> bool:
    return not is_remote(name) and os.path.exists(name) and not os.path.isfile(name)


def _find_remote(given: str) -> list[str]:
    fs, path = filesystem(given)
    try:
        if fs.isfile(path):
            return [given]
        names = fs.find(path) if fs.isdir(path) else fs.glob(path) if glob.has_magic(path) else []
    except Exception as error:  # each store raises its own
        raise unreadable(given, error) from None
    names = sorted(name for name in names if not _is_hidden(name.rsplit("/", 1)[-1]))
    if not names:
        raise UsageError(f"{given}: no such file, folder or pattern in this store")
    return [fs.unstrip_protocol(name) for name in names]


def _keep_visible(subfolders: list[str]) -> bool:
    subfolders[:] = sorted(name for name in subfolders if not _is_hidden(name))
    return True


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_", "run="))  # runs that lie within the input's folder are no input


def suggestion(path: str) -> str:
    """The end of a message about a path that does not exist: the most similar path in its folder, or nothing."""
    folder, name = os.path.split(path)
    try:
        close = difflib.get_close_matches(name, os.listdir(folder or "."), 1)
    except OSError:
        return ""
    return f"; did you mean {os.path.join(folder, close[0])}?" if close else ""
