"""All sources of a run as one stream of documents that says how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nermill.producer.sources import ReadOptions, Source
from nermill.worker.contracts.document import Document

_TOLD_SECONDS = 0.1


@dataclass(frozen=True)
class ReadProgress:
    """How far the reading of a run's input is: documents so far, and stored bytes of all."""

    documents: int
    bytes: int
    total_bytes: int


OnRead = Callable[[ReadProgress], None]


def unheard(_: ReadProgress) -> None:
    """For those who do not watch."""


class Reading:
    """The documents of all sources, in order.

    Args:
        sources: The files.
        sizes: Stored bytes of each.
        options: How they are read.
        on_read: Told ten times a second, and after each file, how far the reading is.

    Attributes:
        counts: Documents of each source so far.
        rejected: Documents that cannot be tagged, so far.
        has_gold: Whether any had gold tags.
    """

    def __init__(
        self, sources: Sequence[Source], sizes: Sequence[int], options: ReadOptions, on_read: OnRead = unheard
    ) -> None:
        self._sources, self._sizes, self._options, self._on_read = sources, sizes, options, on_read
        self.counts = [0] * len(sources)
        self.rejected = 0
        self.has_gold = False

    def documents(self) -> Iterator[Document]:
        """The documents, from the first on at each call.

        Raises:
            UsageError: as ``Source.documents``.
        """
        told = time.monotonic()
        self.counts, self.rejected = [0] * len(self._sources), 0
        for at, source in enumerate(self._sources):
            for document in source.documents(self._options):
                self.counts[at] += 1
                self.rejected += document.fault is not None
                self.has_gold |= document.gold_tags is not None
                yield document
                if time.monotonic() - told > _TOLD_SECONDS:
                    told = time.monotonic()
                    self._tell(at, source.file.position())
            self._tell(at, self._sizes[at])

    def _tell(self, at: int, position: int) -> None:
        self._on_read(ReadProgress(sum(self.counts), sum(self._sizes[:at]) + position, sum(self._sizes)))
