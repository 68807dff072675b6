"""Reads and writes whole files, on a local disk or on any store that fsspec serves; a file is never half-written."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, Protocol, TypeVar, cast

from nermill.worker.contracts import deadline
from nermill.worker.contracts.errors import StoreError, UnreachableError

_LOCAL_SCHEMES = ("file://", "local://")
_BYTES_PER_SECOND = 1 << 20  # slowest upload that does not count as failed
_ADVICE = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "raise the quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "mount it writable",
    errno.EACCES: "give this user access",
    errno.EPERM: "give this user access",
    errno.ENOTDIR: "put a folder in the place of that file",
    errno.EEXIST: "put a folder in the place of that file",
}

_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP)  # errors of file systems without hard links

T = TypeVar("T")


class Store(Protocol):
    """The operations of a run on the place that holds its files; a method may raise any error of that place."""

    def read(self, path: str) -> bytes: ...
    def source(self, path: str) -> str | BinaryIO:
        """The path itself on a disk, else a seekable stream, which the caller closes."""

    def replace(self, path: str, data: bytes) -> None: ...
    def create(self, path: str, data: bytes) -> bool:
        """Writes a file that does not exist yet; returns False, and changes nothing, where it exists."""

    def exists(self, path: str) -> bool: ...
    def sync(self, path: str) -> None:
        """Makes sure that a file which is there stays there, whatever its writer still did."""

    def remove(self, path: str) -> None:
        """Removes a file, which then does not come back; a missing file is no error."""

    def list(self, path: str) -> list[str]:
        """Names in a folder; empty where there is no such folder."""


def without_local_scheme(uri: str) -> str:
    """The path that a ``file://`` or ``local://`` URI stands for; any other URI or path as it is."""
    return next((uri.removeprefix(scheme) for scheme in _LOCAL_SCHEMES if uri.startswith(scheme)), uri)


def open_store(uri: str) -> tuple[Store, str]:
    """The store that serves a URI or path, and the path there.

    Raises:
        StoreError: the scheme is unknown, or the package that serves it is not installed.
    """
    path = without_local_scheme(uri)
    if "://" not in path:
        return Disk(), os.path.abspath(path)
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise StoreError(f"{uri}: {error}") from None
    return ObjectStore(fs), path.rstrip("/")


class Disk:
    """A local disk.

    A file is written under a temporary name, synced, and then renamed; ``create`` links it instead, which fails where
    the file exists. On a file system without hard links ``create`` looks first and then renames, so two processes that
    create the same file at the same moment may both succeed.
    """

    def read(self, path: str) -> bytes:
        with open(path, "rb") as stream:
            return stream.read()

    def source(self, path: str) -> str:
        return path

    def replace(self, path: str, data: bytes) -> None:
        with _temporary_file(path, data) as temporary:
            os.replace(temporary, path)

    def create(self, path: str, data: bytes) -> bool:
        with _temporary_file(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if os.path.exists(path):
                    return False
                os.replace(temporary, path)
        return True

    def exists(self, path: str) -> bool:
        try:
            os.stat(path)  # os.path.exists says of a disk that does not answer that the file is not there
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def sync(self, path: str) -> None:
        _sync_folder(os.path.dirname(path))

    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError):  # also where the folder is missing
            with suppress(FileNotFoundError):
                os.unlink(path)
            _sync_folder(os.path.dirname(path))

    def list(self, path: str) -> list[str]:
        try:
            return os.listdir(path)
        except FileNotFoundError:
            return []


class ObjectStore:
    """A store behind fsspec; a file is written with one put, and a call without an answer in time counts as failed.

    Args:
        fs: The fsspec file system. Other processes write to the store too, so its cached listings are not used.
    """

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def read(self, path: str) -> bytes:
        return self._call(lambda: bytes(self._fs.cat_file(path)))

    def source(self, path: str) -> BinaryIO:
        return self._call(lambda: cast(BinaryIO, self._fs.open(path, "rb")))

    def replace(self, path: str, data: bytes) -> None:
        self._call(lambda: self._fs.pipe_file(path, data), len(data))

    def create(self, path: str, data: bytes) -> bool:
        """Writes a file with one conditional put where the store has that (S3, Google Cloud Storage).

        Elsewhere it looks first, and two processes that create the same file at the same moment may both succeed.
        """
        if self.exists(path):
            return False
        try:
            self._call(lambda: self._fs.pipe_file(path, data, mode="create"), len(data))
        except FileExistsError:
            return False
        except (TypeError, NotImplementedError):
            self.replace(path, data)
        return True

    def exists(self, path: str) -> bool:
        self._fs.invalidate_cache(path)
        return self._call(lambda: bool(self._fs.exists(path)))

    def sync(self, path: str) -> None:
        """A put lasts once it is answered, and shows nothing before."""

    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._call(lambda: self._fs.rm_file(path))

    def list(self, path: str) -> list[str]:
        self._fs.invalidate_cache(path)
        try:
            entries = self._call(lambda: self._fs.ls(path, detail=False))
        except FileNotFoundError:
            return []
        return [str(entry).rsplit("/", 1)[-1] for entry in entries]

    def _call(self, call: Callable[[], T], size: int = 0) -> T:
        return deadline.within(deadline.SECONDS + size / _BYTES_PER_SECOND, call)


_DEFECTS = (AssertionError, AttributeError, NameError)  # errors in this program, not in the store
_UNREACHABLE = (FileNotFoundError, NotADirectoryError, PermissionError)


@contextmanager
def store_errors(verb: str, path: str) -> Iterator[None]:
    """Turns an error that a store raises inside the ``with`` block into a StoreError with file, reason and remedy.

    Args:
        verb: What is done with the file, as in ``cannot write it``.
        path: The file.

    Raises:
        StoreError, UnreachableError: in the place of the store's error.
    """
    try:
        yield
    except _DEFECTS:
        raise
    except Exception as error:
        kind = UnreachableError if isinstance(error, _UNREACHABLE) else StoreError
        reason = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
        advice = _ADVICE.get(getattr(error, "errno", None) or 0)
        raise kind(f"{path}: cannot {verb} it ({reason})" + (f"; {advice}" if advice else "")) from error


@contextmanager
def _temporary_file(path: str, data: bytes) -> Iterator[str]:
    """Writes the data into a synced file beside ``path``, and removes that file after the ``with`` block.

    The folder is synced at the end, so a rename or link inside the block is durable.

    Yields:
        Path of the temporary file.
    """
    folder, base = os.path.split(path)
    _make_folder(folder)
    temporary = f"{folder}/.{base}.{uuid.uuid4().hex}"
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    _sync_folder(folder)


def _make_folder(folder: str) -> None:
    """Makes a folder that is missing, and those around it; each is synced in the one around it before it is used.

    So one that is not empty was synced. An empty one may be of a process that was killed before it could sync it.
    """
    try:
        with os.scandir(folder) as entries:
            if next(entries, None) is not None:
                return
    except NotADirectoryError:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), folder) from None
    except FileNotFoundError:
        _make_folder(os.path.dirname(folder))
        with suppress(FileExistsError):
            os.mkdir(folder)
    with suppress(PermissionError):  # of a folder that may not be listed
        _sync_folder(os.path.dirname(folder))


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
