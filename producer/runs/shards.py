"""Documents become shards: consecutive documents, cut where a worker's bite is full, written into the run's folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from nermill.producer.sources.live import Position
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import StoreError
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.plan import Shard
from nermill.worker.contracts.shard import encode_shard, shard_table

BYTES_PER_TOKEN = 4
ANOTHER_PRODUCER = "another producer goes on with this stream; this one ends"

Kind = Literal["text", "words"] | None


@dataclass(frozen=True)
class ShardLimits:
    """Where a shard ends: before the first limit would be passed; a document above a limit is a shard of its own.

    Attributes:
        documents: Documents in a shard.
        characters: Code points in a shard; they bound the memory of producer and worker.
        tokens: Estimated tokens in a shard; they bound its time on a device.
    """

    documents: int = 1024
    characters: int = 1 << 20
    tokens: int = 1 << 15


def group_documents(documents: Iterable[Document], limits: ShardLimits) -> Iterator[list[Document]]:
    """Groups consecutive documents of one kind, texts or words; only one group is in memory at a time."""
    group: list[Document] = []
    characters = tokens = 0
    kind: Kind = None
    for document in documents:
        text = document_text(document)
        size, cost = len(text), estimated_tokens(text)
        full = len(group) >= limits.documents or differ(kind, kind_of(document))
        if group and (full or characters + size > limits.characters or tokens + cost > limits.tokens):
            yield group
            group, characters, tokens, kind = [], 0, 0, None
        group.append(document)
        characters += size
        tokens += cost
        kind = kind or kind_of(document)
    if group:
        yield group


def kind_of(document: Document) -> Kind:
    """What a document came as; None for one that cannot be tagged, which goes with either kind."""
    if document.fault is not None:
        return None
    return "text" if document.words is None else "words"


def differ(one: Kind, other: Kind) -> bool:
    """Whether documents of these kinds may not share a shard: a worker tokenizes a shard as a whole."""
    return one is not None and other is not None and one != other


def write_shard(
    run: RunFolder,
    index: int,
    first: int,
    documents: list[Document],
    *,
    position: Position | None = None,
    exclusive: bool = False,
) -> Shard:
    """Writes one shard's file, durably.

    Args:
        position: The place behind it in the input of a stream.
        exclusive: Whether a shard of other documents that is there is kept, and an error.

    Raises:
        StoreError: the store does not take it.
    """
    table = shard_table(documents)
    data, sha256 = encode_shard(table if position is None else table.replace_schema_metadata(position.as_metadata()))
    name = run.shard_file(index)
    if not run.write(name, data, exclusive=exclusive) and run.read(name) != data:
        raise StoreError(f"{run.path(name)}: {ANOTHER_PRODUCER}")
    return Shard(index, first, len(documents), sha256)


def write_shards(run: RunFolder, documents: Iterable[Document], limits: ShardLimits) -> Iterator[Shard]:
    """Writes the documents' shards in order."""
    first = 0
    for index, group in enumerate(group_documents(documents, limits)):
        yield write_shard(run, index, first, group)
        first += len(group)


def document_text(document: Document) -> str:
    """The text that offsets count in; empty for a document that cannot be tagged."""
    return document.text or " ".join(document.words or ())


def estimated_tokens(text: str) -> int:
    """A guess that needs no tokenizer: four UTF-8 bytes a token, at least one."""
    return max(1, len(text.encode(errors="replace")) // BYTES_PER_TOKEN)
