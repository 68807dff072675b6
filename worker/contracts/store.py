"""Whole files on a local disk or on any store that fsspec serves: each appears at once, or not at all."""

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
_BYTES_PER_SECOND = 1 << 20  # the slowest store that is waited for
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

_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP)  # what file systems without hard links answer

T = TypeVar("T")


class Store(Protocol):
    """What a run asks of the place where it lies; any method may raise whatever the place raises."""

    def read(self, path: str) -> bytes: ...
    def source(self, path: str) -> str | BinaryIO:
        """The path itself on a disk, else a seekable stream, to be closed."""

    def replace(self, path: str, data: bytes) -> None: ...
    def create(self, path: str, data: bytes) -> bool:
        """Like ``replace``, but leaves a file that is there as it is; False where it did."""

    def exists(self, path: str) -> bool: ...
    def sync(self, path: str) -> None:
        """Makes sure that a file which is there stays there, whatever its writer still did."""

    def remove(self, path: str) -> None:
        """A file that is not there is fine."""

    def list(self, path: str) -> list[str]:
        """Names in a folder; none where there is no folder."""


def open_store(uri: str) -> tuple[Store, str]:
    """The store that serves a URI or path, and the path there.

    Raises:
        StoreError: nobody serves the scheme, or its package is not installed.
    """
    path = next((uri.removeprefix(scheme) for scheme in _LOCAL_SCHEMES if uri.startswith(scheme)), uri)
    if "://" not in path:
        return Disk(), os.path.abspath(path)
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise StoreError(f"{uri}: {error}") from None
    return ObjectStore(fs), path.rstrip("/")


class Disk:
    """A local disk: written aside, synced, then renamed, or linked where nothing may be replaced.

    A file system without hard links is looked at before the renaming: see ``ObjectStore.create``.
    """

    def read(self, path: str) -> bytes:
        with open(path, "rb") as stream:
            return stream.read()

    def source(self, path: str) -> str:
        return path

    def replace(self, path: str, data: bytes) -> None:
        with _aside(path, data) as aside:
            os.replace(aside, path)

    def create(self, path: str, data: bytes) -> bool:
        with _aside(path, data) as aside:
            try:
                os.link(aside, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if os.path.exists(path):
                    return False
                os.replace(aside, path)
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
        with suppress(FileNotFoundError):
            os.unlink(path)

    def list(self, path: str) -> list[str]:
        try:
            return os.listdir(path)
        except FileNotFoundError:
            return []


class ObjectStore:
    """A store behind fsspec: a file is one put; a call that is not answered in time counts as failed.

    Args:
        fs: The file system, which other processes write to as well: what it remembers is not trusted.
    """

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def read(self, path: str) -> bytes:
        return self._ask(lambda: bytes(self._fs.cat_file(path)))

    def source(self, path: str) -> BinaryIO:
        return self._ask(lambda: cast(BinaryIO, self._fs.open(path, "rb")))

    def replace(self, path: str, data: bytes) -> None:
        self._ask(lambda: self._fs.pipe_file(path, data), len(data))

    def create(self, path: str, data: bytes) -> bool:
        """One conditional put where the store has it (S3, Google Cloud Storage).

        Elsewhere it looks first, and two who write the same file at the same moment may both put theirs.
        """
        if self.exists(path):
            return False
        try:
            self._ask(lambda: self._fs.pipe_file(path, data, mode="create"), len(data))
        except FileExistsError:
            return False
        except (TypeError, NotImplementedError):
            self.replace(path, data)
        return True

    def exists(self, path: str) -> bool:
        self._fs.invalidate_cache(path)
        return self._ask(lambda: bool(self._fs.exists(path)))

    def sync(self, path: str) -> None:
        """A put lasts once it is answered, and shows nothing before."""

    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._ask(lambda: self._fs.rm_file(path))

    def list(self, path: str) -> list[str]:
        self._fs.invalidate_cache(path)
        try:
            entries = self._ask(lambda: self._fs.ls(path, detail=False))
        except FileNotFoundError:
            return []
        return [str(entry).rsplit("/", 1)[-1] for entry in entries]

    def _ask(self, call: Callable[[], T], size: int = 0) -> T:
        return deadline.within(deadline.SECONDS + size / _BYTES_PER_SECOND, call)


_DEFECTS = (AssertionError, AttributeError, NameError)  # ours, not the store's
_UNREACHABLE = (FileNotFoundError, NotADirectoryError, PermissionError)


@contextmanager
def telling(verb: str, path: str) -> Iterator[None]:
    """Turns whatever a store raises inside into a StoreError that names the file, the reason and the remedy."""
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
def _aside(path: str, data: bytes) -> Iterator[str]:
    """The data in a file beside ``path``, synced; what is done with it inside is synced as well."""
    folder, base = os.path.split(path)
    _make_folder(folder)
    aside = f"{folder}/.{base}.{uuid.uuid4().hex}"
    try:
        with open(aside, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        yield aside
    finally:
        with suppress(FileNotFoundError):
            os.unlink(aside)
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
