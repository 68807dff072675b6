"""Tags documents: tokenization, inference and decoding run in parallel.

Any number of threads call ``Pipeline.annotate``. Each tokenizes and decodes its own shard; the threads of ``compute``
run the model on batches that mix windows of all shards. The pipeline does not limit how many windows wait: callers may
call ``await_spare_capacity`` before they begin a shard.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from nermill.worker.contracts.document import Document, Fault
from nermill.worker.contracts.errors import EngineError
from nermill.worker.contracts.labels import choice_of
from nermill.worker.contracts.manifest import TOKENIZER_FILE, Manifest
from nermill.worker.contracts.plan import Options
from nermill.worker.contracts.shard import shard_table
from nermill.worker.engine import Engine, load_engine
from nermill.worker.engine.warmup import token_budget
from nermill.worker.tagging import decode
from nermill.worker.tagging.compute import Compute
from nermill.worker.tagging.pool import Job, Pool
from nermill.worker.tagging.table import (
    Prediction,
    TaggableDocuments,
    part_table,
    rename_gold_labels,
    taggable_documents,
)
from nermill.worker.tagging.tokens import CachedTokenizer, Tokens
from nermill.worker.tagging.windows import split_into_windows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FEW_WINDOWS = 32


@dataclass(frozen=True, slots=True)
class Stats:
    """Measurements of one shard.

    Attributes:
        windows: Number of windows.
        tokens: Number of tokens, special tokens included.
        computed_tokens: The same with padding.
        tokenize_seconds, wait_seconds, compute_seconds, decode_seconds: Seconds of each stage.
        labels: Number of entities that were mapped or left out; see ``contracts.labels``.
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
        """The sum of two measurements, of two shards or of two pieces of one."""
        numbers = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "labels"}
        return Stats(**numbers, labels=dict(Counter(self.labels) + Counter(other.labels)))


@dataclass(frozen=True)
class Annotated:
    """A tagged shard.

    Attributes:
        part: Rows of the part, in input order, without file metadata.
        faults: Fault of each rejected row, by row number.
        stats: Measurements.
    """

    part: pa.Table
    faults: dict[int, Fault]
    stats: Stats


class Pipeline:
    """A loaded engine, its tokenizer, and the threads that run the engine.

    Args:
        engine: The model; closed with the pipeline.
        tokenizer: The artifact's tokenizer.
        manifest: Shapes, layout and token budget of batches; None takes the engine's manifest.

    Attributes:
        clock: Measures the calls of the engine.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, manifest: Manifest | None = None) -> None:
        self.engine = engine
        self.manifest = manifest or engine.manifest
        self.labels = decode.ModelLabels(self.manifest.labels)
        self._tokenizer = CachedTokenizer(tokenizer)
        self._pool = Pool(self.manifest, engine.at_once)
        self._compute = Compute(engine, self._pool, self.manifest)
        self.clock = self._compute.clock

    @property
    def broken(self) -> EngineError | None:
        """The error with which the device failed for good, if it did; nothing is tagged from then on."""
        return self._compute.broken

    def close(self) -> None:
        """Stops the threads and releases the device; shards that are being tagged raise EngineError."""
        self._compute.close()

    def warm_up(self) -> None:
        """Runs the engine on blank batches; raises EngineError where the device refuses a shape."""
        self._compute.warm_up()

    def waiting_tokens(self) -> int:
        """Number of tokens that wait for the device."""
        return self._pool.waiting_tokens()

    def await_spare_capacity(self, timeout: float) -> bool:
        """Waits until the device will soon be idle, or has failed.

        Args:
            timeout: Most seconds to wait.

        Returns:
            False where the device still had enough work after ``timeout``.
        """
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
            on_fed: Called with the shard's job once the shard is tokenized and its windows wait for the device.
            urgent: Whether the windows go before all that wait. The windows of a table that has at most FEW_WINDOWS
                always do, since they hardly delay the others.

        Raises:
            UsageError: ``options.overlap`` is too large for the model's windows.
            EngineError: the device failed for good; no document is the cause.
        """
        self.manifest.check_overlap(options.overlap)
        documents, faults = taggable_documents(table, options)
        started = time.monotonic()
        tokens = self._tokenizer.tokenize(documents.tokenizable, split=documents.split)
        job = self._job(tokens, options)
        tokenized = time.monotonic()
        self._pool.put(job, first=urgent or len(job.windows) <= FEW_WINDOWS)
        on_fed(job)
        job.done.wait()
        computed = time.monotonic()
        if job.error:
            raise EngineError(f"{self.engine.device}: {job.error}") from job.error
        faults |= {
            documents.rows[document]: Fault("model_failure", message) for document, message in job.failed.items()
        }
        part, changes = self._decode(table, documents, job, faults, options, first)
        lengths = job.windows.lengths
        stats = Stats(
            windows=len(lengths),
            tokens=int(lengths.sum()),
            computed_tokens=round(job.computed_tokens),
            tokenize_seconds=tokenized - started,
            wait_seconds=max(0.0, computed - tokenized - job.seconds),
            compute_seconds=job.seconds,
            decode_seconds=time.monotonic() - computed,
            labels=dict(changes),
        )
        return Annotated(part, faults, stats)

    def _job(self, tokens: Tokens, options: Options) -> Job:
        windows = split_into_windows(tokens.bounds, self.manifest.window, options.overlap)
        return Job(tokens, windows, np.empty((len(tokens.ids), len(self.manifest.labels)), np.float32))

    def _decode(
        self,
        table: pa.Table,
        documents: TaggableDocuments,
        job: Job,
        faults: dict[int, Fault],
        options: Options,
        first: int,
    ) -> tuple[pa.Table, Counter[str]]:
        tokens, choice = job.tokens, choice_of(options)
        document = np.repeat(np.arange(len(tokens.counts)), tokens.counts)
        whole = np.flatnonzero(~np.isin(document, list(job.failed)))  # a failed document has no logits
        units = decode.units(job.logits[whole], document[whole], tokens.words[whole], self.labels, options.aggregation)
        units = replace(units, first=whole[units.first], last=whole[units.last])
        spans, labels, changes = decode.choose(
            decode.spans(units, join=options.aggregation != "none"), self.labels, choice
        )
        windows = np.bincount(job.windows.document, minlength=len(tokens.counts))
        prediction = Prediction(tokens, windows, units, spans, labels)
        part = part_table(rename_gold_labels(table, choice, changes), documents, prediction, faults, options, first)
        return part, changes


def load_pipeline(
    artifact: Path, device: str = "cpu", threads: int = 0, *, wrap: Callable[[Engine], Engine] = lambda engine: engine
) -> Pipeline:
    """Loads an artifact on a device and warms it up.

    Args:
        artifact: Its folder.
        device: ``cpu``, ``cuda:N`` or ``npu:N``.
        threads: Compute threads on a CPU; 0 takes as many as this process has cores.
        wrap: Returns the engine that the pipeline calls, such as one that measures.

    Raises:
        ArtifactError: the artifact cannot be loaded on this machine.
        EngineError: the device refuses a compiled shape.
    """
    from tokenizers import Tokenizer

    engine = load_engine(artifact, device, threads)
    manifest = replace(engine.manifest, token_budget=token_budget(engine))
    tokenizer = Tokenizer.from_file(str(artifact / TOKENIZER_FILE))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    pipeline = Pipeline(wrap(engine), tokenizer, manifest)
    pipeline.warm_up()
    pipeline.annotate(
        shard_table([Document("warm", "up")]), Options()
    )  # libraries load parts of themselves on first use
    return pipeline
