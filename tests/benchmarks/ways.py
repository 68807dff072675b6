"""Ways to tag the documents: each is prepared once and then measured again and again, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from nermill.worker.contracts.manifest import TOKENIZER_FILE, Manifest, load_manifest
from nermill.worker.tagging.batching import Placement, in_own_rows, place

PEAK_SIZES = ((1024, 384, 1536), (2048, 1024, 4096))  # the demo model's largest product, and one of BERT-large's
PEAK_SECONDS = 0.3
STARTUP_DOCUMENTS = 4
BUCKETS = (32, 48, 64, 96, 128, 192, 256, 512)  # eight, as those that are published for a 310P


@dataclass(frozen=True)
class Models:
    """One model in several forms.

    Attributes:
        shipped: The artifact as shipped.
        packed: Its weights in packed rows, with scales found on the sample.
        fp32: Its fp32 artifact.
        checkpoint: Its Hugging Face checkpoint.
        openvino: Its int8 artifact for OpenVINO, where that is installed.
        peers: Folder with the graphs of ``tests.benchmarks.peers``.
    """

    shipped: Path
    packed: Path
    fp32: Path
    checkpoint: Path
    openvino: Path | None = None
    peers: Path | None = None


@dataclass(frozen=True)
class Sample:
    """One measurement.

    Attributes:
        documents: Documents tagged.
        seconds: What they took; start-up apart.
        padding_share: 1 − real ÷ computed tokens; None where nobody counts.
        cpu_seconds: Processor time of all processes that took part, start-up apart; None where nobody counts.
        peak_bytes: Memory of the largest process at its peak; likewise.
        startup_seconds: From the command to its first work and from the last to its end, where it is a command.
    """

    documents: int
    seconds: float
    padding_share: float | None
    cpu_seconds: float | None
    peak_bytes: int | None
    startup_seconds: float | None = None


Int = NDArray[np.int64]
Lay = Callable[[Int, Manifest], Placement]  # of waiting windows' lengths the next batch
Measure = Callable[[], Any]
Way = Callable[[Sequence[str], Models, ExitStack], Measure]  # the stack takes what is to be closed in the end


def recipe(texts: Sequence[str], models: Models, stack: ExitStack) -> Measure:
    """The reference recipe: a sentence a row of 512, one at a time; its own clock, which sees the forwards alone."""
    from nermill.model_build.checkpoint import open_checkpoint
    from nermill.model_build.corpus import Text
    from nermill.worker.engine.encoder import build
    from tests.benchmarks.recipe import LENGTH
    from tests.benchmarks.recipe import recipe as tag

    checkpoint = open_checkpoint(str(models.checkpoint))
    model = build(checkpoint.architecture, checkpoint.weights(), layout="plain")
    tokenizer = Tokenizer.from_file(str(models.checkpoint / TOKENIZER_FILE))
    labels = load_manifest(models.shipped).labels
    rows = [Text(tuple(text.split())) for text in texts]
    real = sum(min(len(row.content), LENGTH) for row in rows)

    def measure() -> Sample:
        begun = time.process_time()
        _, seconds = tag(model, tokenizer, labels, rows, swapped=False)
        return _own(len(rows), seconds, 1 - real / (LENGTH * len(rows)), time.process_time() - begun)

    return measure


def pipeline(batch: int) -> Way:
    """Hugging Face's token classification pipeline on the fp32 checkpoint."""

    def way(texts: Sequence[str], models: Models, stack: ExitStack) -> Measure:
        tagger = hugging_face(models.checkpoint)
        lengths = [len(tagger.tokenizer(text)["input_ids"]) for text in texts]
        rows = [lengths[at : at + batch] for at in range(0, len(lengths), batch)]
        padding = 1 - sum(lengths) / sum(len(row) * max(row) for row in rows)
        return lambda: timed(lambda: tagger(list(texts), batch_size=batch), len(texts), padding)

    return way


def hugging_face(checkpoint: Path) -> Any:
    """``transformers.pipeline``; documents longer than the model go through overlapping windows."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint / TOKENIZER_FILE), model_max_length=512, **special
    )
    model = transformers.AutoModelForTokenClassification.from_pretrained(checkpoint)
    return transformers.pipeline(
        "token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="first", stride=64, device="cpu"
    )


def task_per_document(texts: Sequence[str], models: Models, stack: ExitStack) -> Measure:
    """A Celery task a document around the same pipeline, its answers through the result backend."""
    from nermill.producer.local.broker import embedded_broker

    os.environ["BENCH_BROKER"] = stack.enter_context(embedded_broker()).removeprefix("redis+socket://")
    os.environ["BENCH_CHECKPOINT"] = str(models.checkpoint)
    from tests.benchmarks.handmade import tag

    command = [sys.executable, "-m", "celery", "-A", "tests.benchmarks.handmade", "worker"]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}  # who measures as root is told so by Celery
    process = stack.enter_context(
        subprocess.Popen([*command, "--pool", "solo", "--loglevel", "ERROR"], stdout=subprocess.DEVNULL, env=quiet)
    )
    stack.callback(process.terminate)
    tag.delay(texts[0]).get(timeout=120)

    def measure() -> Sample:
        busy, own = _cpu_seconds(process.pid), time.process_time()
        begun = time.perf_counter()
        for answer in [tag.delay(text) for text in texts]:
            answer.get(timeout=600)
        seconds = time.perf_counter() - begun
        used = _cpu_seconds(process.pid) - busy + time.process_time() - own
        return Sample(len(texts), seconds, 0.0, used, _peak_bytes(process.pid))

    return measure


def padded(*lengths: int) -> Lay:
    """One window a row, padded to the nearest of some lengths, in batches of one length that are as full as can be."""

    def lay(waiting: Int, manifest: Manifest) -> Placement:
        nearest = np.array(lengths)[np.searchsorted(lengths, waiting)]
        length = int(nearest[0])
        window = np.flatnonzero(nearest == length)[: manifest.token_budget // length]
        return in_own_rows(waiting, window, (len(window), length))

    return lay


def engine(form: str, lay: Lay = place) -> Way:
    """The bare engine on batches that were prepared beforehand: only ``run`` is timed."""

    def way(texts: Sequence[str], models: Models, stack: ExitStack) -> Measure:
        from nermill.worker.contracts.plan import Options
        from nermill.worker.engine import load_engine
        from nermill.worker.tagging.pool import Job, Work, build_batch
        from nermill.worker.tagging.tokens import tokenize
        from nermill.worker.tagging.windows import split_into_windows

        artifact = getattr(models, form)
        runner = load_engine(artifact)
        manifest = runner.manifest
        tokens = tokenize(Tokenizer.from_file(str(artifact / TOKENIZER_FILE)), texts, split=False)
        windows = split_into_windows(tokens.bounds, manifest.max_length, Options().overlap)
        job = Job(tokens, windows, np.empty((0, 0), np.float32))
        batches, waiting = [], np.arange(len(windows))
        while len(waiting):
            placement = lay(windows.lengths[waiting], manifest)
            number = waiting[placement.window]
            work = Work([job], np.array([0, len(number)]), windows.of(number), placement)
            batches.append(build_batch(work, manifest))
            waiting = np.delete(waiting, placement.window)
        padding = 1 - float(windows.lengths.sum()) / sum(batch.input_ids.size for batch in batches)
        threads = stack.enter_context(ThreadPoolExecutor(runner.at_once))

        def run() -> None:
            deque(threads.map(runner.run, batches), maxlen=0)

        runner.run(batches[0])
        return lambda: timed(run, len(texts), padding)

    return way


def tagger(texts: Sequence[str], models: Models, stack: ExitStack) -> Measure:
    """``Tagger``: the artifact as shipped, without a queue."""
    from nermill.worker import Tagger

    loaded = Tagger.load(models.shipped)
    return lambda: timed(lambda: loaded.tag(texts), len(texts), None)


def mill(form: str) -> Way:
    """``nermill run``: broker, worker, ledger, Parquet; its own seconds, in which some worker held a shard."""

    def way(texts: Sequence[str], models: Models, stack: ExitStack) -> Measure:
        artifact = getattr(models, form)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        numbers = count()
        idle = _nermill_run(texts[:STARTUP_DOCUMENTS], artifact, folder / "startup")

        def measure() -> Sample:
            sample = _nermill_run(texts, artifact, folder / str(next(numbers)))
            return replace(sample, cpu_seconds=max(0.0, _counted(sample) - _counted(idle)))

        return measure

    return way


def _nermill_run(texts: Sequence[str], artifact: Path, work: Path) -> Sample:
    work.mkdir()
    source = work / "documents.jsonl"
    source.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts)), "utf-8")
    command = [sys.executable, "-m", "nermill.producer.cli", "run", str(source), "--out", str(work / "out"), "--json"]
    begun = time.perf_counter()
    with (work / "answer").open("w+b") as answer, (work / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--model", str(artifact)], stdout=answer, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - begun
        if process.returncode:
            raise SystemExit(f"nermill run: exit code {process.returncode}\n{(work / 'log').read_text()}")
        answer.seek(0)
        said = json.load(answer)
    cpu = usage.ru_utime + usage.ru_stime
    peak = usage.ru_maxrss * 1024
    return Sample(len(texts), said["seconds"], said["padding_share"], cpu, peak, wall - said["seconds"])


def peak(texts: Sequence[str], models: Models, stack: ExitStack) -> Measure:
    """The machine's fp32 matrix product in GFLOP/s: the best of three libraries and two sizes."""
    import torch

    from nermill.worker.engine.layers import Linear, OneDnnLinear

    def products(rows: int, inner: int, columns: int) -> list[Callable[[], object]]:
        x, linear = torch.ones(rows, inner), Linear(inner, columns).requires_grad_(False)
        linear.load_state_dict({"weight": torch.ones(inner, columns), "bias": torch.zeros(columns)})
        one, other, laid_out = x.numpy(), linear.weight.numpy(), OneDnnLinear(linear)
        return [lambda: x @ linear.weight, lambda: one @ other, lambda: laid_out(x)]

    def measure() -> float:
        best = 0.0
        for size in PEAK_SIZES:
            for product in products(*size):
                begun, calls = time.perf_counter(), 0
                while (taken := time.perf_counter() - begun) < PEAK_SECONDS:
                    product()
                    calls += 1
                best = max(best, 2 * prod(size) * calls / taken / 1e9)
        return best

    return measure


def timed(call: Callable[[], object], documents: int, padding: float | None) -> Sample:
    """A measurement of one call in this process."""
    cpu, begun = time.process_time(), time.perf_counter()
    call()
    seconds = time.perf_counter() - begun
    return _own(documents, seconds, padding, time.process_time() - cpu)


def _counted(sample: Sample) -> float:
    assert sample.cpu_seconds is not None, "nermill run counts its processor time"
    return sample.cpu_seconds


def _own(documents: int, seconds: float, padding: float | None, cpu_seconds: float) -> Sample:
    return Sample(documents, seconds, padding, cpu_seconds, _peak_bytes(os.getpid()))


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
