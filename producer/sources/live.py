"""An input that is read as it comes: its lines, and the place behind each, from which another process can go on."""

from __future__ import annotations

import hashlib
import json
import os
import select
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

from nermill.worker.contracts.content import BLOCK, MAX_LINE_BYTES
from nermill.worker.contracts.errors import UsageError

_FOLLOW_SECONDS = 0.05
_STOP_SECONDS = 0.1
_METADATA = b"nermill.position"


@dataclass(frozen=True, slots=True)
class Position:
    """A place in an input, behind a line.

    Attributes:
        byte: Bytes before it.
        line: Lines before it.
        sha256: Of those bytes.
    """

    byte: int
    line: int
    sha256: str

    def as_json(self) -> str:
        """As a JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, body: str | bytes) -> Position:
        """The position that ``as_json`` wrote.

        Raises:
            ValueError, TypeError: it is none.
        """
        return cls(**json.loads(body))

    def as_metadata(self) -> dict[bytes, bytes]:
        """As metadata of an Arrow schema."""
        return {_METADATA: self.as_json().encode()}

    @classmethod
    def of_metadata(cls, metadata: Mapping[bytes, bytes] | None) -> Position | None:
        """The position that ``as_metadata`` put there; None where there is none."""
        if not metadata or _METADATA not in metadata:
            return None
        return cls.of_json(metadata[_METADATA])


class LiveLines:
    """The lines of standard input, or of a file that grows.

    Args:
        descriptor: Where to read.
        name: What messages call it; a followed file's path.
        follow: Whether the end of the file is only its end so far.

    Raises:
        UsageError: what is to be followed is no regular file.
    """

    def __init__(self, descriptor: int, name: str, *, follow: bool) -> None:
        if follow and not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UsageError(
                f"{name}: not a regular file, so it cannot be followed; pipe it: nermill submit - < {name}"
            )
        self._descriptor, self._name, self._follow = descriptor, name, follow
        self._byte = self._line = 0
        self._hash = hashlib.sha256()
        self._is_within_line = False

    def skip(self, position: Position, run: str, on_bytes: Callable[[int, int], None] = lambda *_: None) -> None:
        """Passes over what an earlier process made durable; every byte is read, to see that it is the same.

        Args:
            position: Where to go on.
            run: What messages call the run that has what lies before.
            on_bytes: Told after each block how many bytes are passed, and how many that will be.

        Raises:
            UsageError: the input is shorter, or another.
        """
        block = b""
        while self._byte < position.byte:
            block = os.read(self._descriptor, min(BLOCK, position.byte - self._byte))
            if not block:
                raise UsageError(
                    f"{self._name}: ends at byte {self._byte:,}, {run} has {position.byte:,} of its bytes: it was "
                    "truncated, or is another input; give the same one from its beginning, or name another --out"
                )
            self._pass(block)
            on_bytes(self._byte, position.byte)
        if self._hash.hexdigest() != position.sha256:
            raise UsageError(
                f"{self._name}: its first {position.byte:,} bytes are not those that {run} was made of: it was "
                "replaced or edited, or does not begin at its beginning; give the same input, or name another --out"
            )
        self._line = position.line
        self._is_within_line = bool(block) and not block.endswith(b"\n")

    def read(self, stop: threading.Event) -> Iterator[tuple[Position, bytes | None]]:
        """Lines as they come, each with the place behind it; None for a line above MAX_LINE_BYTES.

        Args:
            stop: Ends the reading; what has no line end yet is left.

        Raises:
            UsageError: a followed file was truncated, or another one stands in its place.
        """
        rest, too_long, was_moved = b"", False, False
        while not stop.is_set():
            if not select.select([self._descriptor], [], [], _STOP_SECONDS)[0]:
                continue
            block = os.read(self._descriptor, BLOCK)
            if self._is_within_line and block:
                block = self._end_line(block)
            if not block and self._follow:
                if was_moved:
                    raise self._moved()
                was_moved = self._is_moved(self._byte + len(rest))
                stop.wait(_FOLLOW_SECONDS)
                continue
            *lines, rest = (rest + block).split(b"\n") if block else ([rest] if rest else []) + [b""]
            for line in lines:
                self._line += 1
                self._pass(line + b"\n" if block else line)
                yield (
                    Position(self._byte, self._line, self._hash.hexdigest()),
                    None if too_long else line.removesuffix(b"\r"),
                )
                too_long = False
            if not block:
                return
            if len(rest) > MAX_LINE_BYTES:
                self._pass(rest)
                rest, too_long = b"", True

    def _pass(self, data: bytes) -> None:
        self._hash.update(data)
        self._byte += len(data)

    def _end_line(self, block: bytes) -> bytes:
        """What follows a line that ended without a line end, as a last line may."""
        if not block.startswith(b"\n"):
            raise UsageError(
                f"{self._name}:{self._line}: goes on, and ended here when it was read before; name another --out"
            )
        self._is_within_line = False
        self._pass(b"\n")
        return block[1:]

    def _is_moved(self, position: int) -> bool:
        """Whether the path leads to another file by now, or to none.

        Raises:
            UsageError: the file was truncated.
        """
        mine = os.fstat(self._descriptor)
        if mine.st_size < position:
            raise UsageError(
                f"{self._name}: was truncated to {mine.st_size:,} bytes while it was followed, {position:,} were read; "
                "what was read is kept. Follow what is in it now with another --out"
            )
        try:
            named = os.stat(self._name)
        except OSError:
            return True
        return (named.st_dev, named.st_ino) != (mine.st_dev, mine.st_ino)

    def _moved(self) -> UsageError:
        return UsageError(
            f"{self._name}: was moved, removed or replaced while it was followed; the file that was opened is read to "
            f"its end, line {self._line:,}. Follow the new one with another --out"
        )
