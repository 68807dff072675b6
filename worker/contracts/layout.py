"""Where a run keeps its files, and the little file work that both sides do there through fsspec.

::

    OUT/run=<id>/
      part-00000.parquet           the annotations of that shard, rejected documents included
      _plan.json                   what was asked: inputs, shards, model, options
      _shards/shard-00000.arrow    the documents, normalised; what a worker reads
      _rejects/rejects.parquet     documents that could not be tagged, copied from the parts when the run is complete
      _report.json  _report.html   after evaluation
      _SUCCESS                     every shard has its part
      .huggingface.yaml            tells Hugging Face datasets, from then on, that the parts are the data

Readers of Parquet folders skip names that begin with ``_`` or ``.``, so that the run's folder reads as one table;
datasets (5.2) skips only the latter, and would take ``_plan.json`` and ``_report.json`` for data beside a single part.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

from nermill.worker.contracts.store import Disk, Store, open_store, telling

PLAN_FILE = "_plan.json"
SUCCESS_FILE = "_SUCCESS"
REPORT_JSON = "_report.json"
REPORT_HTML = "_report.html"
SHARD_FOLDER = "_shards"
REJECT_FOLDER = "_rejects"
REJECT_FILE = f"{REJECT_FOLDER}/rejects.parquet"
DATASETS_FILE = ".huggingface.yaml"
FIRST_LAYOUT = "plan.json"  # the plan of a run that was made before the names began with _

ASIDE_SECONDS = 3600.0  # no file is written for so long: one aside that is older has lost its writer

_PART = re.compile(r"part-(\d{5,})\.parquet")
_SHARD = re.compile(r"shard-(\d{5,})\.arrow")
_ASIDE = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}")  # where the disk's files are written before they are renamed


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
    def _place(self) -> tuple[Store, str]:
        return open_store(self.uri)

    @property
    def is_local(self) -> bool:
        return isinstance(self._place[0], Disk)

    def path(self, name: str) -> str:
        """Path of a file of the run, as the store spells it."""
        return f"{self._place[1]}/{name}"

    def read(self, name: str) -> bytes:
        """A whole file."""
        path = self.path(name)
        with telling("read", path):
            return self._place[0].read(path)

    def source(self, name: str) -> str | BinaryIO:
        """What pyarrow opens: a file's path on a disk, elsewhere a seekable stream, to be closed."""
        return self._place[0].source(self.path(name))

    def write(self, name: str, data: bytes, *, exclusive: bool = False) -> bool:
        """Makes a whole file appear at once.

        Args:
            name: File name, relative to the run's folder.
            data: The whole content.
            exclusive: Leave a file that is already there as it is.

        Returns:
            Whether this call's content is what the file now holds.
        """
        path = self.path(name)
        with telling("write", path):
            if exclusive:
                return self._place[0].create(path, data)
            self._place[0].replace(path, data)
            return True

    def exists(self, name: str) -> bool:
        path = self.path(name)
        with telling("look at", path):
            return self._place[0].exists(path)

    def sync(self, name: str) -> None:
        """Makes sure that a file which is there survives the host's failure: its writer may have died too early."""
        path = self.path(name)
        with telling("sync", path):
            self._place[0].sync(path)

    def remove(self, name: str) -> None:
        """Removes a file; one that is not there is fine."""
        path = self.path(name)
        with telling("remove", path):
            self._place[0].remove(path)

    def list(self, folder: str = "") -> list[str]:
        """Names of the files in the run's folder or one below it, sorted; none where there is no folder."""
        path = self.path(folder).rstrip("/")
        with telling("list", path):
            return sorted(self._place[0].list(path))

    def sweep(self) -> int:
        """Removes what killed writers left aside on a local disk (a store's put leaves nothing); returns how many.

        What lies aside of a committed part goes at once, for nobody can commit it any more; anything else goes
        when it is so old that its writer must be dead.
        """
        if not self.is_local:
            return 0
        committed, swept = self.committed(), 0
        for folder in ("", REJECT_FOLDER, SHARD_FOLDER):
            for name in self.list(folder):
                aside = _ASIDE.fullmatch(name)
                path = self.path(f"{folder}/{name}")
                if aside and (_numbers(_PART, [aside["name"]]) & committed or _age(path) > ASIDE_SECONDS):
                    self.remove(f"{folder}/{name}")
                    swept += 1
        return swept

    def committed(self) -> set[int]:
        """Shards whose part is there."""
        return _numbers(_PART, self.list())

    def shards(self) -> set[int]:
        """Shards whose documents are there."""
        return _numbers(_SHARD, self.list(SHARD_FOLDER))

    def shard_file(self, shard: int) -> str:
        return f"{SHARD_FOLDER}/{shard_name(shard)}"


def _numbers(pattern: re.Pattern[str], names: list[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := pattern.fullmatch(name))}


def _age(path: str) -> float:
    try:
        return time.time() - os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0
