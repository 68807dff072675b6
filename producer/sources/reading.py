"""Reads all sources of a run as one stream of documents, and reports the progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nermill.producer.sources import ReadOptions, Source
from nermill.worker.contracts.document import Document

REPORT_SECONDS = 0.1


@dataclass(frozen=True)
class ReadProgress:
    """Progress of reading a run's input.

    Attributes:
        documents: Documents read so far.
        bytes: Stored bytes read so far.
        total_bytes: Stored bytes of all files.
    """

    documents: int
    bytes: int
    total_bytes: int


OnRead = Callable[[ReadProgress], None]


def ignore_progress(_: ReadProgress) -> None:
    """An ``OnRead`` that does nothing."""


class Reading:
    """The documents of all sources, in order.

    Args:
        sources: The files.
        sizes: Stored bytes of each file.
        options: Options of the readers.
        on_read: Called every REPORT_SECONDS and after each file.

    Attributes:
        counts: Documents of each source so far.
        rejected: Documents that cannot be tagged, so far.
        has_gold: Whether any document so far had gold tags.
    """

    def __init__(
        self, sources: Sequence[Source], sizes: Sequence[int], options: ReadOptions, on_read: OnRead = ignore_progress
    ) -> None:
        self._sources, self._sizes, self._options, self._on_read = sources, sizes, options, on_read
        self.counts = [0] * len(sources)
        self.rejected = 0
        self.has_gold = False

    def documents(self) -> Iterator[Document]:
        """All documents; each call reads from the begin.

        Raises:
            UsageError: as ``Source.documents``.
        """
        reported = time.monotonic()
        self.counts, self.rejected = [0] * len(self._sources), 0
        for at, source in enumerate(self._sources):
            for document in source.documents(self._options):
                self.counts[at] += 1
                self.rejected += document.fault is not None
                self.has_gold |= document.gold_tags is not None
                yield document
                if time.monotonic() - reported > REPORT_SECONDS:
                    reported = time.monotonic()
                    self._report(at, source.file.position())
            self._report(at, self._sizes[at])

    def _report(self, at: int, position: int) -> None:
        self._on_read(ReadProgress(sum(self.counts), sum(self._sizes[:at]) + position, sum(self._sizes)))
