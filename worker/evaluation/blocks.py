"""Reads a run's parts as a stream of blocks, each with a bounded number of documents, as arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.layout import RunFolder, part_name
from nermill.worker.contracts.part import measurements, open_part
from nermill.worker.contracts.schema import SCHEMA_VERSION, metadata_of
from nermill.worker.evaluation.chunks import Bools, Ints, LabelIndex, Tags, read_tags
from nermill.worker.evaluation.gold import GoldFile
from nermill.worker.evaluation.selection import choose_entities

_BLOCK_BYTES = 16 << 20  # uncompressed; bounds memory where documents are long
_BLOCK_ROWS = 8192
OnDocuments = Callable[[int, int], None]

_COLUMNS = ["doc_index", "doc_id", "n_tokens", "status", "entities", "words", "tags", "gold_tags"]


@dataclass(frozen=True, slots=True)
class Part:
    """A part that was read.

    Attributes:
        file: Its path.
        rows: Number of documents.
        metadata: File metadata, without prefix.
        stats: The workers' measurements, one object for each shard.
    """

    file: str
    rows: int
    metadata: dict[str, str]
    stats: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive documents of a run. Those with gold tags are *scored*.

    Attributes:
        rows: All documents of the block, with the columns that are read.
        scored: Row of each scored document, int64, shape (scored,).
        gold: Gold tags of the scored documents, normalised to IOB2.
        predicted: Predicted tags of the scored documents; all ``O`` for a rejected document.
    """

    rows: pa.RecordBatch
    scored: Ints
    gold: Tags
    predicted: Tags

    def words(self, document: int) -> list[str]:
        """Words of a scored document; empty where it was rejected."""
        words: list[str] | None = self.rows["words"][int(self.scored[document])].as_py()
        return words or []


@dataclass
class Parts:
    """The committed parts of a run.

    Attributes:
        run: The run's folder.
        shards: Numbers of the parts to read, in order.
        labels: Assigns numbers to labels.
        documents: Documents of the whole run, those without a part included.
        gold: Gold tags from a file, which replace those in the parts.
        on_documents: Called after each block of rows with the documents read so far, and all of the run.
        seen: The parts that have been read.
    """

    run: RunFolder
    shards: list[int]
    labels: LabelIndex
    documents: int
    gold: GoldFile | None = None
    on_documents: OnDocuments = lambda *_: None
    seen: list[Part] = field(default_factory=list)

    def blocks(self) -> Iterator[Block]:
        """All documents, in order; call it once.

        Raises:
            UsageError: a part is damaged or of another version, or gold tags do not match their document.
        """
        for rows in self.rows():
            yield self.block(rows, self.take_gold(rows))

    def block(self, rows: pa.RecordBatch, gold: pa.Array[Any]) -> Block:
        """A block from rows of ``rows``, which have just been read, and their gold tags.

        Raises:
            UsageError: gold tags do not match their document, or a tag belongs to no scheme.
        """
        try:
            return _make_block(rows, gold, self.labels)
        except UsageError as error:
            raise UsageError(f"{self.seen[-1].file}: {error}") from None

    def take_gold(self, rows: pa.RecordBatch) -> pa.Array[Any]:
        """Gold tags of the next rows, from the gold file where there is one."""
        return rows["gold_tags"] if self.gold is None else self.gold.take(rows)

    def rows(self) -> Iterator[pa.RecordBatch]:
        """All documents as they are in the parts, in order; call it once.

        Raises:
            UsageError: a part is damaged or of another version, or the gold file has more documents than the run.
        """
        done = 0
        for shard in self.shards:
            file = self.run.path(part_name(shard))
            try:
                with open_part(self.run, shard) as part:
                    self.seen.append(_read_part(file, part))
                    for rows in part.iter_batches(batch_rows(part), columns=_COLUMNS, use_threads=self.run.is_local):
                        yield rows
                        done += len(rows)
                        self.on_documents(done, self.documents)
            except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UsageError(f"{file}: a damaged part ({reason}); remove it and resume the run") from None
        if self.gold is not None:
            self.gold.finish(self.documents)


def _make_block(rows: pa.RecordBatch, gold: Any, labels: LabelIndex) -> Block:
    if not labels.choice.is_all:
        rows = choose_entities(rows, labels)
    has_gold = gold.is_valid()
    scored = np.flatnonzero(has_gold.to_numpy(zero_copy_only=False))
    gold = gold.filter(has_gold)
    tags: Any = rows["tags"].filter(has_gold)
    lengths = _lengths(gold)
    tagged: Bools = tags.is_valid().to_numpy(zero_copy_only=False)
    if (wrong := np.flatnonzero(tagged & (_lengths(tags) != lengths))).size:
        document = int(wrong[0])
        raise UsageError(
            f"document {rows['doc_id'][int(scored[document])].as_py()!r} has {lengths[document]} gold tags"
            f" for {_lengths(tags)[document]} words; correct the input and run it again"
        )
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    predicted = np.full(int(offsets[-1]), "O", object)
    predicted[np.repeat(tagged, lengths)] = tags.flatten().to_numpy(zero_copy_only=False)
    return Block(
        rows,
        scored,
        read_tags(gold.flatten(), offsets, labels, normalise=True),
        read_tags(pa.array(predicted, pa.string()), offsets, labels, normalise=False),
    )


def _lengths(lists: pa.Array[Any]) -> Ints:
    lengths: Ints = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths


def batch_rows(part: pq.ParquetFile) -> int:
    """Number of rows of a part that are read at once: about 16 MiB uncompressed, at most 8,192."""
    meta = part.metadata
    size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
    return int(np.clip(_BLOCK_BYTES * max(meta.num_rows, 1) // max(size, 1), 1, _BLOCK_ROWS))


def _read_part(file: str, part: pq.ParquetFile) -> Part:
    metadata = metadata_of(part.schema_arrow)
    if (version := metadata.get("schema_version")) != SCHEMA_VERSION:
        raise UsageError(f"{file}: part schema version {version!r}, this nermill reads {SCHEMA_VERSION!r}")
    if missing := set(_COLUMNS) - set(part.schema_arrow.names):
        raise ValueError(f"no column {', '.join(sorted(missing))}")
    stats = measurements(part.schema_arrow) if "stats" in metadata else []
    if not all({"claimed", "finished"} <= entry.keys() for entry in stats):
        raise ValueError("measurements without claimed and finished")
    return Part(file, part.metadata.num_rows, metadata, stats)
