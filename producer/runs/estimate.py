"""A dry run: what an input holds, how long its documents are, what it would cost; nothing is sent or written."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from nermill.producer.runs.planning import Request, check_writable, model_identity, normalised, planned_run_id
from nermill.producer.runs.shards import document_text, estimated_tokens, group_documents
from nermill.producer.sources import open_sources
from nermill.producer.sources.files import is_remote
from nermill.producer.sources.reading import OnRead, Reading, ignore_progress
from nermill.worker.contracts.costs import Costs, Way, load_costs, seconds_of_full_batches
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.layout import PLAN_FILE, RunFolder
from nermill.worker.contracts.manifest import TOKENIZER_FILE, load_manifest, resolve_artifact

EXACT_DOCUMENTS = 20_000  # documents that are tokenized; the lengths of the rest are scaled from theirs
BENCH_FILE = "bench.json"
EDGES = (8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
_NAMED_DUPLICATES = 5


@dataclass
class Estimate:
    """What a dry run found.

    Attributes:
        run: Where the run would be; empty without ``--out``.
        inputs: URI, format and size in bytes of each file.
        left_out: Files that are not read, each with the reason.
        exists: Whether it was planned before, so that submitting resumes it.
        lengths: Documents by token length.
        tokens_from: How lengths were found.
        long: Documents above the model's length.
        duplicates: Documents whose id was there before, and the ids of the first few.
        seconds: Expected device seconds by way of filling batches, where a table of costs is known.
        way: The one that the table's graph takes.
        seconds_from: Where the table is from.
        price_per_hour: Of one device, in a currency that the user knows.
    """

    run: str
    run_id: str
    exists: bool
    inputs: list[dict[str, Any]]
    left_out: list[str]
    documents: int = 0
    rejected: int = 0
    shards: int = 0
    tokens: int = 0
    longest: int = 0
    max_length: int = 0
    long: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    tokens_from: str = "an estimate of 4 bytes a token"
    duplicates: int = 0
    duplicate_ids: list[str] = field(default_factory=list)
    seconds: dict[Way, float] = field(default_factory=dict)
    way: Way = "packed"
    seconds_from: str = ""
    price_per_hour: float | None = None

    @property
    def price(self) -> dict[str, Any] | None:
        """Money for the run and for a million documents of its kind, where a price and the device time are known."""
        if self.price_per_hour is None or not self.seconds:
            return None
        run = self.price_per_hour * self.seconds[self.way] / 3600
        documents = self.documents - self.rejected
        million = run / documents * 1e6 if documents else None
        return {"per_hour": self.price_per_hour, "run": run, "per_million_documents": million}

    @property
    def histogram(self) -> list[dict[str, Any]]:
        """Documents by token length; ``to`` is None for the last, which is open."""
        counts = [0] * (len(EDGES) + 1)
        for length, documents in self.lengths.items():
            counts[bisect_left(EDGES, length)] += documents
        starts, ends = [1, *(edge + 1 for edge in EDGES)], [*EDGES, None]
        return [{"from": s, "to": e, "documents": n} for s, e, n in zip(starts, ends, counts, strict=True)]

    def as_json(self) -> dict[str, Any]:
        """The object of ``plan --json``."""
        documents = self.documents - self.rejected
        return {
            "run": self.run or None,
            "run_id": self.run_id or None,
            "exists": self.exists,
            "inputs": self.inputs,
            "left_out": self.left_out,
            "documents": {"total": self.documents, "rejected": self.rejected},
            "shards": self.shards,
            "tokens": {"total": self.tokens, "longest": self.longest, "from": self.tokens_from},
            "histogram": self.histogram,
            "max_length": self.max_length or None,
            "long": {"documents": self.long, "share": round(self.long / documents, 4) if documents else 0.0},
            "duplicate_ids": {"documents": self.duplicates, "examples": self.duplicate_ids},
            "device_seconds": round(self.seconds[self.way], 1) if self.seconds else None,
            "device_seconds_by_way": {way: round(seconds, 1) for way, seconds in self.seconds.items()} or None,
            "device_seconds_from": self.seconds_from or None,
            "price": self.price,
        }


def estimate(
    request: Request, costs: str = "", on_read: OnRead = ignore_progress, price_per_hour: float | None = None
) -> Estimate:
    """Reads an input as ``submit`` would, and counts.

    Args:
        request: As for ``make_plan``; ``out`` may be empty.
        costs: Name or file of a table of costs; default: ``bench.json`` in the artifact's folder, where it was
            measured on this very artifact.
        on_read: Told now and then how far the reading is.
        price_per_hour: Of one device.

    Raises:
        UsageError: an input, the model, the costs, the price or the output is wrong.
    """
    if price_per_hour is not None and not math.isfinite(price_per_hour):
        raise UsageError(f"--price-per-hour {price_per_hour}: say what one device costs an hour")
    model = model_identity(request.model, request.options)
    artifact = None if request.model is None else resolve_artifact(request.model)
    opened = open_sources(request.inputs, request.read)
    sources = opened.sources
    prints = [source.file.fingerprint() for source in sources]
    found = Estimate("", "", False, [], opened.left_out)
    if request.out:
        out = normalised(request.out)
        if not is_remote(out):
            check_writable(out)
        found.run_id = planned_run_id(out, request, model, sources, prints)
        found.run = f"{out}/run={found.run_id}"
        found.exists = RunFolder(found.run).exists(PLAN_FILE)
    found.price_per_hour = price_per_hour
    table = _table(costs, artifact, model["sha256"])
    if table is None and price_per_hour is not None:
        raise UsageError(
            "--price-per-hour: the device's time is not known; measure it with nermill-build bench MODEL --json "
            "> bench.json and name that with --costs"
        )
    lengths = _Lengths(artifact)
    found.max_length = load_manifest(artifact).max_length if artifact else 0
    found.inputs = [
        {"uri": s.file.uri, "format": s.format, "bytes": p[1]} for s, p in zip(sources, prints, strict=True)
    ]
    hashes = array("q")
    reading = Reading(sources, [size for _, size in prints], request.read, on_read)
    for group in group_documents(reading.documents(), request.limits):
        found.shards += 1
        hashes.extend(hash(document.id) for document in group)
        _count(found, group, lengths)
    found.tokens_from = lengths.told
    found.duplicates, found.duplicate_ids = _duplicates(hashes, reading)
    if table is not None:
        window = min(found.max_length or table.longest, table.longest)
        found.seconds = seconds_of_full_batches(found.lengths, table, window, request.options.overlap)
        found.way, found.seconds_from = table.way, f"{table.kind}: {table.source}"
    return found


class _Lengths:
    """Token lengths: exact for the first documents, then scaled by what those had."""

    def __init__(self, artifact: Path | None) -> None:
        self._tokenizer: Any = None
        self._exact = self._guessed = self._documents = 0
        self.told = Estimate.tokens_from
        if artifact is not None:
            try:
                from tokenizers import Tokenizer
            except ModuleNotFoundError:
                return
            self._tokenizer = Tokenizer.from_file(str(artifact / TOKENIZER_FILE))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self.told = "the model's tokenizer"

    def of(self, texts: list[str]) -> list[int]:
        guesses = [estimated_tokens(text) for text in texts]
        if self._tokenizer is None:
            return guesses
        if self._documents < EXACT_DOCUMENTS:
            exact = [len(encoding.ids) for encoding in self._tokenizer.encode_batch(texts)]
            self._documents += len(texts)
            self._exact += sum(exact)
            self._guessed += sum(guesses)
            return exact
        self.told = f"the model's tokenizer on {self._documents:,} documents, scaled for the rest"
        scale = self._exact / max(1, self._guessed)
        return [max(1, round(guess * scale)) for guess in guesses]


def _count(found: Estimate, group: list[Document], lengths: _Lengths) -> None:
    texts = [document_text(document) for document in group if document.fault is None]
    found.documents += len(group)
    found.rejected += len(group) - len(texts)
    for length in lengths.of(texts):
        found.lengths[length] += 1
        found.tokens += length
        found.longest = max(found.longest, length)
        found.long += bool(found.max_length) and length > found.max_length


def _duplicates(hashes: array[int], reading: Reading) -> tuple[int, list[str]]:
    import numpy as np

    values = np.frombuffer(hashes, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    sorted_ = values[order]
    again = np.sort(order[1:][sorted_[1:] == sorted_[:-1]])
    if not again.size:
        return 0, []
    named = set(again[:_NAMED_DUPLICATES].tolist())
    read = islice(reading.documents(), max(named) + 1)
    return int(again.size), sorted({document.id for at, document in enumerate(read) if at in named})


def _table(costs: str, artifact: Path | None, sha256: str) -> Costs | None:
    """The table that was named, else the one in the artifact's folder, if it was measured on this very artifact."""
    if costs:
        return load_costs(costs)
    if artifact is None or not (artifact / BENCH_FILE).exists():
        return None
    table = load_costs(str(artifact / BENCH_FILE))
    return table if table.artifact_sha256 == sha256 else None
