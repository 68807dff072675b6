"""``Tagger``: documents in, annotations out, in the caller's process and without a queue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nermill.worker.contracts.document import Annotation, Document, Entity
from nermill.worker.contracts.manifest import resolve_artifact
from nermill.worker.contracts.plan import Options
from nermill.worker.contracts.shard import shard_table
from nermill.worker.tagging.pipeline import Pipeline, load_pipeline


class Tagger:
    """Tags documents in this process, without a queue.

    ::

        with Tagger.load("demo") as tagger:
            tagger.tag(["Ada Lovelace lived in London."])[0].entities
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    @classmethod
    def load(cls, model: str | Path = "demo", *, device: str = "cpu", threads: int = 0) -> Tagger:
        """Loads an artifact.

        Args:
            model: ``demo`` for the bundled model, or the artifact's folder.
            device: ``cpu``, ``cuda:N`` or ``npu:N``.
            threads: Compute threads on a CPU; 0 takes as many as this process has cores.

        Raises:
            ArtifactError: the artifact cannot be loaded on this machine.
        """
        return cls(load_pipeline(resolve_artifact(str(model)), device, threads))

    def tag(
        self, documents: Iterable[str] | Iterable[Sequence[str]], *, urgent: bool = False, **options: object
    ) -> list[Annotation]:
        """Tags texts, or documents that are lists of words.

        Args:
            documents: A list of texts, or a list of documents that are lists of words.
            urgent: Whether they go before other documents that wait for the device.
            options: Fields of ``Options``: aggregation, overlap, max_chars.

        Returns:
            One annotation for each document, in order; ``fault`` is set where a document could not be tagged.

        Raises:
            TypeError: ``documents`` is a single text, or has elements that are neither texts nor lists of words.
            EngineError: the device failed for good.
        """
        records = [_record(n, document) for n, document in enumerate(_listed(documents))]
        if len({record.words is None for record in records}) > 1:
            raise TypeError(f"texts and lists of words in one call: tag them in two; {_WANTED}")
        annotated = self.pipeline.annotate(
            shard_table(records),
            Options(**options),  # type: ignore[arg-type]
            urgent=urgent,
        )
        entities: list[Any] = annotated.part["entities"].to_pylist()
        tags: list[Any] = annotated.part["tags"].to_pylist()
        return [
            Annotation(tuple(Entity(**e) for e in found), row_tags and tuple(row_tags), annotated.faults.get(row))
            for row, (found, row_tags) in enumerate(zip(entities, tags, strict=True))
        ]

    def close(self) -> None:
        """Releases the device."""
        self.pipeline.close()

    def __enter__(self) -> Tagger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_WANTED = 'pass a list of texts, ["Ada met Bob."], or a list of lists of words, [["Ada", "met", "Bob", "."]]'


def _listed(documents: object) -> Iterable[object]:
    if isinstance(documents, (str, bytes)) or not isinstance(documents, Iterable):
        raise TypeError(f"{type(documents).__name__} {documents!r:.60} in the place of a list of documents: {_WANTED}")
    return documents


def _record(number: int, document: object) -> Document:
    if isinstance(document, str):
        return Document(id=str(number), text=document)
    if isinstance(document, Sequence) and not isinstance(document, bytes):
        if all(isinstance(word, str) for word in document):
            return Document(id=str(number), words=tuple(document))
        wrong = next(word for word in document if not isinstance(word, str))
        raise TypeError(
            f"document {number} holds {wrong!r:.60} ({type(wrong).__name__}) in the place of a word: {_WANTED}"
        )
    raise TypeError(f"document {number} is {document!r:.60} ({type(document).__name__}): {_WANTED}")
