"""Documents in, annotations out: tokenize ∥ compute ∥ decode.

Any number of threads call ``Pipeline.annotate``; each tokenizes and decodes its own shard while the compute
threads keep the device busy with batches mixed from all of them. How much waits between them is the callers' to
bound: they may ask ``await_spare_capacity`` before they begin.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nermill.worker.contracts.document import Annotation, Document, Entity, Fault
from nermill.worker.contracts.errors import EngineError
from nermill.worker.contracts.labels import choice_of
from nermill.worker.contracts.manifest import TOKENIZER_FILE, Manifest, resolve_artifact
from nermill.worker.contracts.plan import Options
from nermill.worker.contracts.shard import shard_table
from nermill.worker.engine import Batch, Engine, load_engine
from nermill.worker.engine.warmup import blank_batch, token_budget
from nermill.worker.tagging import decode
from nermill.worker.tagging.pool import Job, Pool, Work, give_up, halves, hand_out, lay_out
from nermill.worker.tagging.table import Prediction, Spelling, chosen_gold, part_table, spell
from nermill.worker.tagging.windows import Tokens, cut, tokenize

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FEW_WINDOWS = 32
WARM_ROWS = 1  # rows of the batch that warms an engine whose shapes are free


@dataclass(frozen=True, slots=True)
class Stats:
    """What one shard cost. Tokens include special tokens; ``computed_tokens`` padding as well; times in seconds.

    ``labels`` counts the entities that were mapped or left out: see ``contracts.labels``.
    """

    windows: int
    tokens: int
    computed_tokens: int
    tokenize_seconds: float
    wait_seconds: float
    compute_seconds: float
    decode_seconds: float
    labels: dict[str, int]

    def __add__(self, other: Stats) -> Stats:
        """What two shards, or two pieces of one, cost together."""
        numbers = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "labels"}
        return Stats(**numbers, labels=dict(Counter(self.labels) + Counter(other.labels)))


@dataclass(frozen=True)
class Annotated:
    """A shard after the mill.

    Attributes:
        part: Rows of the part, in input order, without the run's own columns' metadata.
        faults: Fault of each rejected row, by row number.
        stats: What it cost.
    """

    part: pa.Table
    faults: dict[int, Fault]
    stats: Stats


class Pipeline:
    """A loaded engine, its tokenizer, and the threads between them.

    Args:
        engine: The model; closed with the pipeline.
        tokenizer: The artifact's tokenizer.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self.manifest: Manifest = engine.manifest
        self.labels = decode.Labels(self.manifest.labels)
        self._tokenizer = tokenizer
        self._pool = Pool(self.manifest)
        self._busy_since: dict[int, float] = {}
        self._answered = 0.0  # when the device last did
        self._clock = threading.Lock()  # over the line above: calls that end together count their time once
        self.broken: EngineError | None = None
        self._device = threading.Semaphore(engine.in_flight)
        self._threads = [  # one more than the device takes: it prepares the next batch
            threading.Thread(target=self._compute, name=f"compute-{n}", daemon=True)
            for n in range(engine.in_flight + 1)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stops the compute threads and gives the device back."""
        self._pool.close()
        for thread in self._threads:
            thread.join()
        self.engine.close()

    def warm_up(self) -> None:
        """Runs every compiled shape: once to warm it up, once more to see what it costs.

        Raises:
            EngineError: the device does not take a shape.
        """
        for shape in self.manifest.shapes or ((WARM_ROWS, min(64, self.manifest.window)),):
            batch = blank_batch(shape, self.manifest)
            self.engine.run(batch)
            begun = time.monotonic()
            self.engine.run(batch)
            self._pool.learn(shape, shape[0] * shape[1], time.monotonic() - begun)

    def busy_seconds(self) -> float:
        """How long the oldest call of the engine has been under way; 0.0 when idle."""
        return max((time.monotonic() - since for since in list(self._busy_since.values())), default=0.0)

    def waiting_tokens(self) -> int:
        """Tokens that wait for the device."""
        return self._pool.waiting_tokens()

    def await_spare_capacity(self, timeout: float) -> bool:
        """Waits until the device will soon have nothing to do, or broke; False where it has enough for ``timeout``."""
        return self._pool.await_spare_capacity(timeout)

    def annotate(
        self,
        table: pa.Table,
        options: Options,
        first: int = 0,
        on_fed: Callable[[Job], object] = lambda _: None,
        *,
        urgent: bool = False,
    ) -> Annotated:
        """Tags the documents of a shard; blocks until they are done.

        Args:
            table: Documents, with the SHARD schema.
            options: The run's options.
            first: ``doc_index`` of the first row.
            on_fed: Called with the shard's windows when they wait for the device.
            urgent: Whether its windows go before those that wait; so do those of a table with few windows, which hardly
                delay the others.

        Raises:
            UsageError: the model's windows cannot overlap so much.
            EngineError: the device failed for good; no document is to blame.
        """
        self.manifest.check_overlap(options.overlap)
        spelling, faults = spell(table, options)
        begun = time.monotonic()
        tokens = tokenize(self._tokenizer, spelling.tokenizable, split=spelling.split)
        job = self._job(tokens, options)
        tokenized = time.monotonic()
        self._pool.put(job, first=urgent or len(job.windows) <= FEW_WINDOWS)
        on_fed(job)
        job.done.wait()
        computed = time.monotonic()
        if job.error:
            raise EngineError(f"{self.engine.device}: {job.error}") from job.error
        faults |= {spelling.rows[document]: Fault("model_failure", message) for document, message in job.failed.items()}
        part, tally = self._decode(table, spelling, job, faults, options, first)
        lengths = job.windows.lengths
        stats = Stats(
            windows=len(lengths),
            tokens=int(lengths.sum()),
            computed_tokens=round(job.computed_tokens),
            tokenize_seconds=tokenized - begun,
            wait_seconds=max(0.0, computed - tokenized - job.seconds),
            compute_seconds=job.seconds,
            decode_seconds=time.monotonic() - computed,
            labels=dict(tally),
        )
        return Annotated(part, faults, stats)

    def _job(self, tokens: Tokens, options: Options) -> Job:
        windows = cut(tokens.bounds, self.manifest.window, options.overlap)
        return Job(tokens, windows, np.empty((len(tokens.ids), len(self.manifest.labels)), np.float32))

    def _decode(
        self, table: pa.Table, spelling: Spelling, job: Job, faults: dict[int, Fault], options: Options, first: int
    ) -> tuple[pa.Table, Counter[str]]:
        tokens, choice = job.tokens, choice_of(options)
        document = np.repeat(np.arange(len(tokens.counts)), tokens.counts)
        whole = np.flatnonzero(~np.isin(document, list(job.failed)))  # a failed document's logits were never written
        units = decode.units(job.logits[whole], document[whole], tokens.words[whole], self.labels, options.aggregation)
        units = replace(units, first=whole[units.first], last=whole[units.last])
        spans, labels, tally = decode.choose(
            decode.spans(units, join=options.aggregation != "none"), self.labels, choice
        )
        windows = np.bincount(job.windows.document, minlength=len(tokens.counts))
        prediction = Prediction(tokens, windows, units, spans, labels)
        part = part_table(chosen_gold(table, choice, tally), spelling, prediction, faults, options, first)
        return part, tally

    def _compute(self) -> None:
        """Prepares a batch while others are on the device, so that the device goes from one to the next."""
        try:
            while work := self._pool.take():
                batch = lay_out(work, self.manifest)
                with self._device:
                    done = self._run(work, batch)
                if done:
                    hand_out(work, *done)
                self._pool.finished()
        except Exception as error:
            self._fail(EngineError(f"{type(error).__name__}: {error}"))

    def _run(self, work: Work, batch: Batch) -> tuple[NDArray[np.float32], float] | None:
        """A batch's logits and seconds; None where it failed, and was run again in parts."""
        me = threading.get_ident()
        begun = self._busy_since[me] = time.monotonic()
        try:
            logits = self.engine.run(batch)
            with self._clock:
                done = time.monotonic()
                seconds = max(0.0, done - max(begun, self._answered))  # it waited for the batch before it
                self._answered = done
            self._pool.learn(batch.input_ids.shape, work.placement.tokens, seconds)
            return logits, seconds
        except EngineError as error:
            self._find_culprit(work, error)
            return None
        finally:
            del self._busy_since[me]

    def _find_culprit(self, work: Work, error: EngineError) -> None:
        """Runs a failed batch again, and what fails again in halves: a bad document costs that document alone.

        A batch that was only too large for the device's memory costs none.
        """
        try:
            self.warm_up()
        except EngineError:
            self._fail(error)
            return
        suspected = [work]
        while suspected:
            part = suspected.pop()
            begun = self._busy_since[threading.get_ident()] = time.monotonic()
            try:
                hand_out(part, self.engine.run(lay_out(part, self.manifest)), time.monotonic() - begun)
            except EngineError as reason:
                if len(part.windows) > 1:
                    suspected += halves(part, self.manifest)
                else:
                    give_up(part, str(reason))

    def _fail(self, error: EngineError) -> None:
        self.broken = error
        self._pool.close(error)


def load_pipeline(
    artifact: Path, device: str = "cpu", threads: int = 0, *, wrap: Callable[[Engine], Engine] = lambda engine: engine
) -> Pipeline:
    """Loads an artifact on a device and warms it up.

    Args:
        artifact: Its folder.
        device: ``cpu``, ``cuda:N`` or ``npu:N``.
        threads: Compute threads on a CPU; 0 takes as many as this process may use.
        wrap: Returns the engine that the pipeline calls, such as one that measures.

    Raises:
        ArtifactError: the artifact cannot be served here.
        EngineError: the device does not take a compiled shape.
    """
    from tokenizers import Tokenizer

    engine = load_engine(artifact, device, threads)
    engine.manifest = replace(engine.manifest, token_budget=token_budget(engine))
    tokenizer = Tokenizer.from_file(str(artifact / TOKENIZER_FILE))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    pipeline = Pipeline(wrap(engine), tokenizer)
    pipeline.warm_up()
    pipeline.annotate(shard_table([Document("warm", "up")]), Options())  # loads what libraries load on first use
    return pipeline


class Tagger:
    """The engine without a queue: texts in, entities out.

    ::

        with Tagger.load("demo") as tagger:
            tagger.tag(["Ada Lovelace lived in London."])[0].entities
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    @classmethod
    def load(cls, model: str | Path = "demo", *, device: str = "cpu", threads: int = 0) -> Tagger:
        """Loads an artifact: ``demo`` for the bundled model, or its folder.

        Raises:
            ArtifactError: the artifact cannot be served here.
        """
        return cls(load_pipeline(resolve_artifact(str(model)), device, threads))

    def tag(
        self, documents: Iterable[str] | Iterable[Sequence[str]], *, urgent: bool = False, **options: object
    ) -> list[Annotation]:
        """Tags texts, or documents that are split into words.

        Args:
            documents: A list of texts, or a list of documents that are lists of words.
            urgent: Whether they go before other documents that wait for the device.
            options: Fields of ``Options``: aggregation, overlap, max_chars.

        Returns:
            One annotation a document, in order; ``fault`` is set where one could not be tagged.

        Raises:
            TypeError: documents that are a single text, or hold something else than texts or lists of words.
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
        entities, tags = annotated.part["entities"].to_pylist(), annotated.part["tags"].to_pylist()
        return [
            Annotation(tuple(Entity(**e) for e in found), row_tags and tuple(row_tags), annotated.faults.get(row))
            for row, (found, row_tags) in enumerate(zip(entities, tags, strict=True))
        ]

    def close(self) -> None:
        """Gives the device back."""
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
