"""The files of a run and their names, and how both sides read and write them.

::

    OUT/run=<id>/
      part-00000.parquet           the annotations of that shard, rejected documents included
      _plan.json                   the plan: inputs, shards, model, options
      _shards/shard-00000.arrow    the documents of that shard, normalised, for the worker
      _rejects/rejects.parquet     rejected documents, copied from the parts when the run is complete
      _report.json  _report.html   the evaluation
      _SUCCESS                     every shard has its part
      .huggingface.yaml            tells Hugging Face datasets that the parts are the data; written with _SUCCESS

Readers of Parquet folders skip names that begin with ``_`` or ``.``, so the run's folder reads as one table. Hugging
Face datasets (5.2) skips only names with ``.``: without its file it would read ``_plan.json`` as data.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

from nermill.worker.contracts.store import Disk, Store, open_store, store_errors

PLAN_FILE = "_plan.json"
SUCCESS_FILE = "_SUCCESS"
REPORT_JSON = "_report.json"
REPORT_HTML = "_report.html"
SHARD_FOLDER = "_shards"
REJECT_FOLDER = "_rejects"
REJECT_FILE = f"{REJECT_FOLDER}/rejects.parquet"
DATASETS_FILE = ".huggingface.yaml"
FIRST_LAYOUT = "plan.json"  # name of the plan in nermill's first version

TEMPORARY_SECONDS = 3600.0  # a temporary file that is older was left by a process that ended

_PART = re.compile(r"part-(\d{5,})\.parquet")
_SHARD = re.compile(r"shard-(\d{5,})\.arrow")
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}")  # temporary files of ``store.Disk``


def part_name(shard: int) -> str:
    """Name of a shard's part. It depends on the shard alone, so a shard that is tagged twice has one part."""
    return f"part-{shard:05d}.parquet"


def shard_name(shard: int) -> str:
    """Name of the file with a shard's documents, below ``_shards``."""
    return f"shard-{shard:05d}.arrow"


@dataclass(frozen=True)
class RunFolder:
    """One run's folder, on a local disk or on any store that fsspec serves.

    All methods raise StoreError, with the file's name, when the store fails.

    Attributes:
        uri: Path or URI of the folder.
    """

    uri: str

    @cached_property
    def _place(self) -> tuple[Store, str]:
        return open_store(self.uri)

    @property
    def is_local(self) -> bool:
        return isinstance(self._place[0], Disk)

    def path(self, name: str) -> str:
        """Path of a file of the run within its store."""
        return f"{self._place[1]}/{name}"

    def read(self, name: str) -> bytes:
        """The content of a file."""
        path = self.path(name)
        with store_errors("read", path):
            return self._place[0].read(path)

    def source(self, name: str) -> str | BinaryIO:
        """A file for pyarrow to open: its path on a disk, elsewhere a seekable stream, which the caller closes."""
        return self._place[0].source(self.path(name))

    def write(self, name: str, data: bytes, *, exclusive: bool = False) -> bool:
        """Writes a file; readers see the whole content or none of it.

        Args:
            name: File name, relative to the run's folder.
            data: The whole content.
            exclusive: Do not replace a file that exists.

        Returns:
            Whether this call wrote the file; False only where ``exclusive`` and the file existed.
        """
        path = self.path(name)
        with store_errors("write", path):
            if exclusive:
                return self._place[0].create(path, data)
            self._place[0].replace(path, data)
            return True

    def exists(self, name: str) -> bool:
        path = self.path(name)
        with store_errors("look at", path):
            return self._place[0].exists(path)

    def sync(self, name: str) -> None:
        """Makes sure that a file which is there survives the host's failure: its writer may have died too early."""
        path = self.path(name)
        with store_errors("sync", path):
            self._place[0].sync(path)

    def remove(self, name: str) -> None:
        """Removes a file, which then does not come back when the host fails; a missing file is no error."""
        path = self.path(name)
        with store_errors("remove", path):
            self._place[0].remove(path)

    def list(self, folder: str = "") -> list[str]:
        """Names of the files in the run's folder or a folder below it, sorted; empty where there is no such folder."""
        path = self.path(folder).rstrip("/")
        with store_errors("list", path):
            return sorted(self._place[0].list(path))

    def remove_stale_files(self) -> int:
        """Removes temporary files that ended processes left on a local disk; returns how many.

        A temporary file of a part that is committed is removed at once, since it cannot be committed any more. Any
        other is removed when it is older than TEMPORARY_SECONDS. Object stores have no temporary files.

        Raises:
            StoreError: the disk does not answer.
        """
        if not self.is_local:
            return 0
        committed, removed = self.committed(), 0
        for folder in ("", REJECT_FOLDER, SHARD_FOLDER):
            for name in self.list(folder):
                aside = _TEMPORARY.fullmatch(name)
                path = self.path(f"{folder}/{name}")
                if aside and (_numbers(_PART, [aside["name"]]) & committed or _age(path) > TEMPORARY_SECONDS):
                    self.remove(f"{folder}/{name}")
                    removed += 1
        return removed

    def committed(self) -> set[int]:
        """Numbers of the shards whose part exists."""
        return _numbers(_PART, self.list())

    def shards(self) -> set[int]:
        """Numbers of the shards whose documents exist."""
        return _numbers(_SHARD, self.list(SHARD_FOLDER))

    def shard_file(self, shard: int) -> str:
        return f"{SHARD_FOLDER}/{shard_name(shard)}"


def _numbers(pattern: re.Pattern[str], names: list[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := pattern.fullmatch(name))}


def _age(path: str) -> float:
    with store_errors("look at", path):
        try:
            return time.time() - os.stat(path).st_mtime
        except FileNotFoundError:
            return 0.0
