"""Places where runs lie: a disk that forgets what was not synced when its host fails, and a store of objects.

Both stand below the product's own ``Disk`` and ``ObjectStore``: the first in the place of ``os``, ``open`` and
``shutil``, the second as a file system of fsspec. Each call that another process could see is a step of the world.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

from fsspec import AbstractFileSystem

from tests.exploration.state import content


class Steps(Protocol):
    """What a place asks of the world."""

    now: float

    def text(self, text: str) -> object: ...

    def step(self, label: str, effect: Callable[[], Any], *, writes: bool = False, failure: Any = None) -> Any: ...
    def sees_disk(self) -> bool:
        """Whether the disk is mounted where the caller runs."""


def broken() -> OSError:
    return OSError(5, "Input/output error")


@dataclass(eq=False)
class Inode:
    """A file's content, and whether it was synced."""

    data: bytes = b""
    is_synced: bool = False


class Folder:
    """Entries of a folder, and those of them that were synced; a value is a file or a folder."""

    def __init__(self) -> None:
        self.entries: dict[str, Inode | Folder] = {}
        self.synced: dict[str, Inode | Folder] = {}


class Disk:
    """A disk's files; ``version`` grows with every change."""

    def __init__(self, world: Steps) -> None:
        self._world = world
        self.root = Folder()
        self.version = 0
        self._open: dict[int, Folder | Inode] = {}
        self._digest = ((-1, 0.0), 0)
        self.os = self._os()
        self.shutil = SimpleNamespace(rmtree=self._rmtree)

    def _find(self, path: str) -> Inode | Folder | None:
        found: Inode | Folder | None = self.root if self._world.sees_disk() else Folder()
        for name in path.strip("/").split("/") if path.strip("/") else ():
            found = found.entries.get(name) if isinstance(found, Folder) else None
        return found

    def _folder(self, path: str) -> Folder:
        found = self._find(path)
        if not isinstance(found, Folder):
            raise FileNotFoundError(2, "No such file or directory", path)
        return found

    def _at(self, path: str) -> tuple[Folder, str]:
        folder, name = os.path.split(path)
        return self._folder(folder), name

    def files(self, path: str) -> dict[str, bytes]:
        """What a reader finds in a folder and below it: relative paths and contents, without files aside."""
        found = self._find(path)
        return dict(_walk(found, lambda folder: folder.entries)) if isinstance(found, Folder) else {}

    def durable(self, path: str) -> dict[str, bytes]:
        """What would be there after the host failed now."""
        found: Inode | Folder | None = self.root
        for name in path.strip("/").split("/"):
            found = found.synced.get(name) if isinstance(found, Folder) else None
        return dict(_walk(found, lambda folder: folder.synced, only_synced=True)) if isinstance(found, Folder) else {}

    def fail(self) -> None:
        """The host failed: what was not synced is gone; of a file that was not, its name stays where that was."""
        self.version += 1

        def revert(folder: Folder) -> None:
            folder.entries = dict(folder.synced)
            for entry in folder.entries.values():
                if isinstance(entry, Folder):
                    revert(entry)
                elif not entry.is_synced:
                    entry.data = b""

        revert(self.root)

    def digest(self) -> int:
        """A hash of all files."""

        def of(entry: Inode | Folder) -> int:
            if isinstance(entry, Inode):
                return hash((content(entry.data), entry.is_synced))
            parts = (entry.entries, entry.synced) if entry.entries != entry.synced else (entry.entries,)
            return hash(tuple(frozenset((named(name), of(inner)) for name, inner in part.items()) for part in parts))

        def named(name: str) -> object:  # a file aside ends with an id
            return (name[:-32], self._world.text(name[-32:])) if name.startswith(".") else name

        if self._digest[0] != (self.version, self._world.now):
            self._digest = (self.version, self._world.now), of(self.root)
        return self._digest[1]

    # In the place of the module os

    def _os(self) -> Any:
        path = SimpleNamespace(
            **{name: getattr(os.path, name) for name in ("abspath", "split", "dirname", "basename", "join")},
            exists=self._exists,
            lexists=lambda path: self._find(path) is not None,
            isdir=lambda path: isinstance(self._find(path), Folder),
        )
        same = ("O_RDONLY", "O_DIRECTORY", "W_OK", "X_OK", "fsencode", "fspath")
        return SimpleNamespace(
            **{name: getattr(os, name) for name in same},
            path=path,
            access=lambda *_: True,
            makedirs=self._makedirs,
            mkdir=lambda path: self._step("mkdir", path, lambda: self._mkdir(path)),
            rmdir=lambda path: self._step("rmdir", path, lambda: self._rmdir(path)),
            scandir=self._scandir,
            open=self._open_folder,
            close=lambda descriptor: self._open.pop(descriptor),
            fsync=self._fsync,
            link=lambda source, target: self._step("link", target, lambda: self._link(source, target)),
            replace=lambda source, target: self._step("rename", target, lambda: self._move(source, target)),
            rename=lambda source, target: self._step("rename", target, lambda: self._move(source, target)),
            unlink=self._unlink,
            listdir=lambda path: self._step("list", path, lambda: sorted(self._folder(path).entries), writes=False),
            stat=self._stat,
        )

    def _step(self, verb: str, path: str, effect: Callable[[], Any], *, writes: bool = True) -> Any:
        return self._world.step(f"disk.{verb} {_short(path)}", effect, writes=writes, failure=broken)

    def _exists(self, path: str) -> bool:
        try:
            self._stat(path)
        except OSError:
            return False
        return True

    def _stat(self, path: str) -> Any:
        if path != "/":
            self._step("stat", path, lambda: _there(self._find(path), path) and None, writes=False)
        return SimpleNamespace(st_mtime=0.0)

    def _mkdir(self, path: str) -> None:
        folder, name = self._at(path)
        if name in folder.entries:
            raise FileExistsError(17, "File exists", path)
        folder.entries[name] = Folder()
        self.version += 1

    def _rmdir(self, path: str) -> None:
        if self._folder(path).entries:
            raise OSError(39, "Directory not empty", path)
        folder, name = self._at(path)
        del folder.entries[name]
        self.version += 1

    @contextmanager
    def _scandir(self, path: str) -> Iterator[Iterator[str]]:
        yield iter(self._world.step("", lambda: sorted(self._folder(path).entries)))

    def _makedirs(self, path: str, exist_ok: bool = False) -> None:
        names = path.strip("/").split("/")
        for end in range(1, len(names) + 1):
            if self._find("/" + "/".join(names[:end])) is None:
                self._mkdir("/" + "/".join(names[:end]))

    def _descriptor(self, of: Folder | Inode) -> int:
        descriptor = max(self._open, default=2) + 1
        self._open[descriptor] = of
        return descriptor

    def _open_folder(self, path: str, flags: int) -> int:
        return self._descriptor(self._folder(path))

    def _fsync(self, descriptor: int) -> None:
        entry = self._open[descriptor]

        def effect() -> None:
            if isinstance(entry, Inode):
                entry.is_synced = True
            else:
                entry.synced = dict(entry.entries)
            self.version += 1

        self._world.step("disk.sync", effect, writes=True, failure=broken)

    def _link(self, source: str, target: str) -> None:
        folder, name = self._at(target)
        if name in folder.entries:
            raise FileExistsError(17, "File exists", target)
        folder.entries[name] = _there(self._find(source), source)
        self.version += 1

    def _move(self, source: str, target: str) -> None:
        of, name = self._at(source)
        entry = _there(of.entries.get(name), source)
        to, new = self._at(target)
        del of.entries[name]
        to.entries[new] = entry
        self.version += 1

    def _unlink(self, path: str) -> None:
        def effect() -> None:
            folder, name = self._at(path)
            if name not in folder.entries:
                raise FileNotFoundError(2, "No such file or directory", path)
            del folder.entries[name]
            self.version += 1

        if os.path.basename(path).startswith("."):
            self._world.step("", effect)  # nobody reads it
        else:
            self._step("remove", path, effect)

    def _rmtree(self, path: str, ignore_errors: bool = False) -> None:
        def effect() -> None:
            folder, name = self._at(path)
            del folder.entries[name]
            self.version += 1

        try:
            self._step("rmtree", path, effect)
        except (OSError, KeyError):
            if not ignore_errors:
                raise

    # In the place of the function open

    @contextmanager
    def open(self, path: str, mode: str) -> Any:
        if mode == "rb":
            yield io.BytesIO(self.read(path))
            return
        assert mode == "xb"
        inode = Inode()

        def effect() -> None:
            folder, name = self._at(path)
            folder.entries[name] = inode
            self.version += 1

        self._world.step("", effect)
        yield _Writer(inode, self._descriptor(inode))

    def read(self, path: str) -> bytes:
        def effect() -> bytes:
            found = _there(self._find(path), path)
            assert isinstance(found, Inode), path
            return found.data

        return bytes(self._step("read", path, effect, writes=False))


class _Writer:
    def __init__(self, inode: Inode, descriptor: int) -> None:
        self._inode, self._descriptor = inode, descriptor

    def write(self, data: bytes) -> None:
        self._inode.data += data

    def flush(self) -> None:
        """Nothing is buffered."""

    def fileno(self) -> int:
        return self._descriptor


def _there(entry: Any, path: str) -> Any:
    if entry is None:
        raise FileNotFoundError(2, "No such file or directory", path)
    return entry


def _walk(folder: Folder, entries: Callable[[Folder], dict[str, Any]], *, only_synced: bool = False) -> Iterable[Any]:
    for name, entry in entries(folder).items():
        if isinstance(entry, Folder):
            for inner, data in _walk(entry, entries, only_synced=only_synced):
                yield f"{name}/{inner}", data
        elif not name.startswith(".") and (entry.is_synced or not only_synced):
            yield name, entry.data


def _short(path: str) -> str:
    """A path in a step's name: without the ids that differ from walk to walk."""
    return _ID.sub("*", path.rpartition("run=")[2].partition("/")[2] or path.rpartition("/")[2])


_ID = re.compile(r"[0-9a-f]{32}")


class Bucket(AbstractFileSystem):  # type: ignore[misc]
    """A store like S3: a put is whole and durable, may ask that nothing is there, and nothing is renamed.

    ``world`` and ``objects`` belong to the class, since fsspec keeps one file system for all who ask.
    """

    protocol = "sim"
    cachable = False
    world: Any = None
    objects: dict[str, bytes] = {}  # noqa: RUF012
    version = 0
    _digest = (-1, 0)

    @classmethod
    def begin(cls, world: Steps) -> None:
        cls.world, cls.objects, cls.version, cls._digest = world, {}, 0, (-1, 0)

    @classmethod
    def digest(cls) -> int:
        """A hash of all objects."""
        if cls._digest[0] != cls.version:
            cls._digest = cls.version, hash(frozenset((name, content(data)) for name, data in cls.objects.items()))
        return cls._digest[1]

    @classmethod
    def files(cls, path: str) -> dict[str, bytes]:
        """What lies below a folder: relative paths and contents."""
        return {name[len(path) + 1 :]: data for name, data in cls.objects.items() if name.startswith(f"{path}/")}

    def _step(self, verb: str, path: str, effect: Callable[[], Any], *, writes: bool = False) -> Any:
        return self.world.step(f"store.{verb} {_short(path)}", effect, writes=writes, failure=broken)

    def _content(self, path: str) -> bytes:
        if path not in self.objects:
            raise FileNotFoundError(2, "No such object", path)
        return self.objects[path]

    def cat_file(self, path: str, **_: Any) -> bytes:
        path = self._strip_protocol(path)
        return bytes(self._step("read", path, lambda: self._content(path)))

    def open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        return io.BytesIO(self.cat_file(path))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        path = self._strip_protocol(path)

        def effect() -> None:
            if mode == "create" and path in self.objects:
                raise FileExistsError(17, "Precondition failed", path)
            self.objects[path] = value
            Bucket.version += 1

        self._step("put" if mode == "overwrite" else "create", path, effect, writes=True)

    def exists(self, path: str, **_: Any) -> bool:
        path = self._strip_protocol(path)
        return bool(self._step("exists", path, lambda: path in self.objects or bool(self.files(path))))

    def ls(self, path: str, detail: bool = False, **_: Any) -> list[str]:
        path = self._strip_protocol(path)

        def effect() -> list[str]:
            names = sorted({name.partition("/")[0] for name in self.files(path)})
            if not names:
                raise FileNotFoundError(2, "No such prefix", path)
            return [f"{path}/{name}" for name in names]

        return list(self._step("list", path, effect))

    def rm_file(self, path: str) -> None:
        path = self._strip_protocol(path)

        def effect() -> None:
            self._content(path)
            del self.objects[path]
            Bucket.version += 1

        self._step("remove", path, effect, writes=True)

    def rm(self, path: str | list[str], recursive: bool = False, **_: Any) -> None:
        for one in [path] if isinstance(path, str) else path:
            one = self._strip_protocol(one)
            for name in sorted(self.files(one)) if recursive else ():
                self.rm_file(f"{one}/{name}")
            if not recursive:
                self.rm_file(one)

    def copy(self, path1: str, path2: str, **_: Any) -> None:
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)

        def effect() -> None:
            self.objects[target] = self._content(source)
            Bucket.version += 1

        self._step("copy", target, effect, writes=True)

    def invalidate_cache(self, path: str | None = None) -> None:
        """Nothing is remembered."""
