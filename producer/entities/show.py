"""Reads the tagged documents of a run with their texts, and writes them as CoNLL columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from nermill.producer.runs.shards import document_text
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import StoreError, UsageError
from nermill.worker.contracts.layout import RunFolder, part_name
from nermill.worker.contracts.part import open_part
from nermill.worker.contracts.plan import Plan, Shard
from nermill.worker.contracts.shard import read_documents, read_shard


@dataclass(frozen=True)
class TaggedDocument:
    """One tagged document.

    Attributes:
        row: Its row in the part, by column.
        text: The text to which the offsets of entities refer; empty where it is not known.
    """

    row: dict[str, Any]
    text: str

    def pieces(self) -> Iterator[tuple[str, str]]:
        """The text as pairs of piece and label; the label is empty outside of entities."""
        at = 0
        for entity in self.row["entities"]:
            if entity["start"] > at:
                yield self.text[at : entity["start"]], ""
            yield self.text[entity["start"] : entity["end"]], entity["label"]
            at = entity["end"]
        if at < len(self.text):
            yield self.text[at:], ""


def read_rows(run: RunFolder, plan: Plan, limit: int | None) -> Iterator[TaggedDocument]:
    """The documents of the committed parts, in the order of the input.

    Args:
        run: The run's folder.
        plan: Its plan.
        limit: Most documents; None for all.

    Raises:
        UsageError: the texts are neither in the parts nor in the shards.
        StoreError: a part or shard cannot be read.
    """
    committed = run.committed()
    shards = (shard for shard in plan.shards if shard.index in committed)
    return islice((document for shard in shards for document in _rows(run, shard)), limit)


def conll_lines(run: RunFolder, plan: Plan, limit: int | None) -> Iterator[str]:
    """Lines of word and predicted IOB2 tag, and a blank line after each document; rejected documents are left out.

    Raises:
        UsageError: the run's documents are texts, not lists of words.
    """
    for document in read_rows(run, plan, limit):
        words, tags = document.row["words"], document.row["tags"]
        if document.row["status"] != "ok":
            continue
        if words is None or tags is None:
            raise UsageError(f"{run.uri}: its documents are texts, not words; --format conll needs CoNLL input")
        yield from (f"{word} {tag}" for word, tag in zip(words, tags, strict=True))
        yield ""


def _rows(run: RunFolder, shard: Shard) -> Iterator[TaggedDocument]:
    documents = None
    try:
        with open_part(run, shard.index) as part:
            for batch in part.iter_batches(64, use_threads=run.is_local):
                for row in batch.to_pylist():
                    text = row.get("text")
                    if text is None and row["words"] is not None:
                        text = " ".join(row["words"])
                    elif text is None and row["status"] == "ok":
                        documents = documents or _documents(run, shard)
                        text = document_text(documents[row["doc_index"] - shard.first])
                    yield TaggedDocument(row, text or "")
    except (pa.ArrowException, FileNotFoundError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(
            f"{run.path(part_name(shard.index))}: damaged part ({reason}); remove it and run nermill resume"
        ) from None


def _documents(run: RunFolder, shard: Shard) -> list[Document]:
    if not run.exists(run.shard_file(shard.index)):
        raise UsageError(
            f"{run.uri}: its texts do not exist any more (neither in its parts nor in {run.shard_file(shard.index)}); "
            "tag the input again with --keep-text"
        )
    return read_documents(read_shard(run, shard.index, shard.sha256))
