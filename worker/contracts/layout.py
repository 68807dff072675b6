"""Where a run keeps its files, and the little file work that both sides do there through fsspec.

::

    OUT/run=<id>/
      plan.json                    what was asked: inputs, shards, model, options
      _shards/shard-00000.arrow    the documents, normalised; what a worker reads
      part-00000.parquet           the annotations of that shard
      rejects/part-00000.parquet   documents that could not be tagged
      report.json  report.html     after evaluation
      _SUCCESS                     every shard has its part

Folders that begin with ``_`` are skipped by the Parquet readers of the field.
"""

from __future__ import annotations

import os
import re
import uuid
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from worker.contracts.errors import StoreError

PLAN_FILE = "plan.json"
SUCCESS_FILE = "_SUCCESS"
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
SHARD_FOLDER = "_shards"
REJECT_FOLDER = "rejects"

_PART = re.compile(r"part-(\d{5,})\.parquet")
_SHARD = re.compile(r"shard-(\d{5,})\.arrow")


def part_name(shard: int) -> str:
    """Name of a shard's part: a function of the shard alone, so that a repeated shard meets its own part."""
    return f"part-{shard:05d}.parquet"


def shard_name(shard: int) -> str:
    """Name of a shard's documents, below ``_shards``."""
    return f"shard-{shard:05d}.arrow"


@dataclass(frozen=True)
class RunFolder:
    """One run's folder on a local disk or on any store that fsspec serves.

    All methods raise StoreError with the file's name when the store does not do what is asked.
    """

    uri: str

    @cached_property
    def _store(self) -> tuple[Any, str]:
        if "://" not in self.uri:
            return None, os.path.abspath(self.uri)
        import fsspec

        try:
            fs, path = fsspec.core.url_to_fs(self.uri)
        except (ImportError, ValueError) as error:
            raise StoreError(f"{self.uri}: {error}") from None
        return fs, path.rstrip("/")

    @property
    def is_local(self) -> bool:
        return self._store[0] is None

    def path(self, name: str) -> str:
        """Path of a file of the run, as the store spells it."""
        return f"{self._store[1]}/{name}"

    def read(self, name: str) -> bytes:
        """A whole file."""
        fs, path = self._store[0], self.path(name)
        try:
            if fs is not None:
                return bytes(fs.cat_file(path))
            with open(path, "rb") as stream:
                return stream.read()
        except Exception as error:
            raise _store_error("read", path, error) from error

    def write(self, name: str, data: bytes, *, exclusive: bool = False) -> bool:
        """Makes a whole file appear at once: written aside, synced, renamed; on a store, one put.

        Args:
            name: File name, relative to the run's folder.
            data: The whole content.
            exclusive: Leave a file that is already there as it is.

        Returns:
            Whether this call's content is what the file now holds.
        """
        fs, path = self._store[0], self.path(name)
        try:
            if fs is None:
                return _write_local(path, data, exclusive)
            if exclusive and fs.exists(path):
                return False
            fs.pipe_file(path, data)
            return True
        except Exception as error:
            raise _store_error("write", path, error) from error

    def exists(self, name: str) -> bool:
        fs, path = self._store[0], self.path(name)
        try:
            return os.path.exists(path) if fs is None else bool(fs.exists(path))
        except Exception as error:
            raise _store_error("look at", path, error) from error

    def remove(self, name: str) -> None:
        """Removes a file; one that is not there is fine."""
        fs, path = self._store[0], self.path(name)
        try:
            if fs is None:
                os.unlink(path)
            else:
                fs.rm_file(path)
        except FileNotFoundError:
            return
        except Exception as error:
            raise _store_error("remove", path, error) from error

    def list(self, folder: str = "") -> list[str]:
        """Names of the files in the run's folder or one below it; none where there is no folder."""
        fs, path = self._store[0], self.path(folder).rstrip("/")
        try:
            if fs is None:
                return sorted(os.listdir(path))
            fs.invalidate_cache(path)
            return sorted(str(entry).rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))
        except FileNotFoundError:
            return []
        except Exception as error:
            raise _store_error("list", path, error) from error

    def committed(self) -> set[int]:
        """Shards whose part is there."""
        return _numbers(_PART, self.list())

    def shards(self) -> set[int]:
        """Shards whose documents are there."""
        return _numbers(_SHARD, self.list(SHARD_FOLDER))

    def shard_file(self, shard: int) -> str:
        return f"{SHARD_FOLDER}/{shard_name(shard)}"

    def reject_file(self, shard: int) -> str:
        return f"{REJECT_FOLDER}/{part_name(shard)}"


def _numbers(pattern: re.Pattern[str], names: list[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := pattern.fullmatch(name))}


def _write_local(path: str, data: bytes, exclusive: bool) -> bool:
    folder, base = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    aside = f"{folder}/.{base}.{uuid.uuid4().hex}"
    try:
        with open(aside, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if exclusive:
            try:
                os.link(aside, path)
            except FileExistsError:
                return False
        else:
            os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.unlink(aside)
    _sync_folder(folder)
    return True


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _store_error(verb: str, path: str, error: Exception) -> StoreError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return StoreError(f"{path}: cannot {verb} it ({reason})")
