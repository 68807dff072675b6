"""``faulty://``: an fsspec store that several processes share, and that fails or hangs on demand.

Its files are in the folder ``FAULT_STORE``. The file ``FAULT_STORE/.fault`` holds ``500`` (each call fails),
``500 0.3`` (that share of the calls fails), ``hang`` (calls wait until the file is removed) or ``slow 2`` (a put takes
so many seconds). A put is atomic, as on an object store.
"""

from __future__ import annotations

import errno
import os
import random
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem


class FaultyStore(AbstractFileSystem):
    """The store."""

    protocol = "faulty"
    cachable = False

    def _local(self, path: str) -> Path:
        root = Path(os.environ["FAULT_STORE"])
        words = self._fault(root / ".fault")
        if words[:1] == ["500"] and random.random() < float(words[1] if words[1:] else 1):
            raise OSError(errno.EIO, "500 Internal Server Error")
        while self._fault(root / ".fault") == ["hang"]:
            time.sleep(0.05)
        return root / self._strip_protocol(path)

    @staticmethod
    def _fault(file: Path) -> list[str]:
        try:
            return file.read_text().split()
        except FileNotFoundError:
            return []

    def ls(self, path: str, detail: bool = False, **_: Any) -> list[Any]:
        return [f"{path}/{name}" for name in os.listdir(self._local(path)) if not name.startswith(".put-")]

    def exists(self, path: str, **_: Any) -> bool:
        return self._local(path).exists()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return self._local(path).read_bytes()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        target = self._local(path)
        words = self._fault(Path(os.environ["FAULT_STORE"]) / ".fault")
        if words[:1] == ["slow"]:
            time.sleep(float(words[1]))
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.parent / f".put-{uuid.uuid4().hex}"
        aside.write_bytes(value)
        try:
            (os.link if mode == "create" else os.replace)(aside, target)
        finally:
            aside.unlink(missing_ok=True)

    def rm_file(self, path: str) -> None:
        self._local(path).unlink()

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return self._local(path).open(mode)


fsspec.register_implementation("faulty", FaultyStore)
