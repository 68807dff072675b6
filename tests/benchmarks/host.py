"""The host's own ceiling: the whole mill around engines that cost nothing, or exactly what a device would.

python -m tests.benchmarks.host tokens    processor time of tokenizing a sentence, cached and by Hugging Face
python -m tests.benchmarks.host null      one process, and one a core, on an engine that answers at once
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from tokenizers import Tokenizer

from nermill.model_build.shapes import batches, best_shapes
from nermill.producer.runs.shards import ShardLimits
from nermill.producer.runs.status import Status
from nermill.worker.contracts.costs import load_costs
from nermill.worker.contracts.device import Device
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.manifest import TOKENIZER_FILE, load_manifest, resolve_artifact
from nermill.worker.contracts.plan import Options
from nermill.worker.contracts.shard import shard_table
from nermill.worker.process.supervisor import cores_of
from nermill.worker.tagging.pipeline import Pipeline
from nermill.worker.tagging.tokens import CachedTokenizer, tokenize
from tests.benchmarks.corpora import Corpus, default_data, read_corpora
from tests.benchmarks.engines import NullEngine
from tests.harness import Harness, Worker, harness

APP = "tests.benchmarks.app"
COSTS = "310p3-bert-large"
COMPILED = 4  # shapes of the simulated 310P3
SENTENCES_PER_SECOND = 500.0
PACED_SHARD = 64  # documents: a device's last shard is an eighth of a second
DEVICES = (1, 2, 4, 8)


def repeated(texts: Sequence[str], count: int) -> list[str]:
    """``count`` documents, the texts again and again."""
    return [texts[number % len(texts)] for number in range(count)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table of a part, medians over its rounds."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.host", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=("tokens", "null"))
    parser.add_argument("--data", type=Path, default=default_data(), help="CoNLL file; default %(default)s")
    parser.add_argument("--documents", type=int, default=30_000, help="sentences; default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    options = parser.parse_args(arguments)
    texts = read_corpora(options.data, 3250)["sentences"].texts
    if options.part == "tokens":
        print("| processor time, µs a sentence | median | shortest |\n|---|---|---|")
        for name, taken in token_seconds(texts[: options.documents], options.rounds).items():
            print(f"| {name} | {1e6 * median(taken):.1f} | {1e6 * min(taken):.1f} |")
        return
    rounds = null_over_tokenizer(repeated(texts, options.documents), options.rounds)
    print("| processes | sentences/s | most | the tokenizer alone, all cores | ratio |\n|---|---|---|---|---|")
    for processes in sorted({1, len(os.sched_getaffinity(0))}):
        rates = [entry[f"documents_per_second_{processes}"] for entry in rounds]
        alone, ratio = (
            median(entry[f"{key}_{processes}"] for entry in rounds) for key in ("tokenizer_per_second", "ratio")
        )
        print(f"| {processes} | {median(rates):,.0f} | {max(rates):,.0f} | {alone:,.0f} | {ratio:.2f} |")
    busy = median(entry["processor_seconds_1"] for entry in rounds)
    print(f"\n{1e6 * busy:.1f} µs a sentence in the worker, of processor time, by one process")


def token_seconds(texts: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Processor time of one text in seconds, round by round: the arrays that the worker goes on with."""
    tokenizer = Tokenizer.from_file(str(resolve_artifact("demo") / TOKENIZER_FILE))
    found: dict[str, list[float]] = {}

    def take(name: str, call: Callable[[], object]) -> None:
        begun = time.process_time()
        call()
        found.setdefault(name, []).append((time.process_time() - begun) / len(texts))

    for _ in range(rounds):
        cached = CachedTokenizer(tokenizer)
        take("Hugging Face", lambda: tokenize(tokenizer, texts, split=False))
        take("cached, new words", partial(cached.tokenize, texts, split=False))
        take("cached, known words", partial(cached.tokenize, texts, split=False))
    return found


def tokenizer_rate(texts: Sequence[str], part: int = 4096) -> float:
    """Documents a second of ``encode_batch`` alone, on all cores."""
    tokenizer = Tokenizer.from_file(str(resolve_artifact("demo") / TOKENIZER_FILE))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    begun = time.perf_counter()
    for at in range(0, len(texts), part):
        tokenizer.encode_batch(texts[at : at + part], add_special_tokens=False)
    return len(texts) / (time.perf_counter() - begun)


def null_over_tokenizer(texts: Sequence[str], rounds: int) -> list[dict[str, float]]:
    """The mill on the null engine, by one worker process and by one a core, beside the tokenizer, round by round.

    Processes share out the cores, as those of ``nermill-worker --devices cpu,cpu`` do.
    """
    cores = len(os.sched_getaffinity(0))
    found: list[dict[str, float]] = [{} for _ in range(rounds)]
    for processes in sorted({1, cores}):
        with _mill() as mill:
            for share in cores_of([Device("cpu", 0)] * processes):
                mill.worker(APP, within=["taskset", "--cpu-list", ",".join(map(str, share))])
            _start(mill, processes)
            mill_rate(mill, texts[: len(texts) // 4])
            for entry in found:
                before = tokenizer_rate(texts)
                began = sum(map(_processor_seconds, mill.workers))
                rate = mill_rate(mill, texts).documents_per_second
                used = sum(map(_processor_seconds, mill.workers)) - began
                alone = (before + tokenizer_rate(texts)) / 2
                entry[f"documents_per_second_{processes}"] = rate
                entry[f"tokenizer_per_second_{processes}"] = alone
                entry[f"ratio_{processes}"] = rate / alone
                entry[f"processor_seconds_{processes}"] = used / len(texts)
    for entry in found:
        entry["ratio"] = entry[f"ratio_{cores}"]
    return found


def paced_scaling(texts: Sequence[str], seconds: float, rounds: int) -> dict[int, list[float]]:
    """Share of ``n`` devices' 500 sentences/s that the mill reaches, by ``n``, round by round."""
    found: dict[int, list[float]] = {}
    with _mill() as mill:
        for devices in DEVICES:
            _start(mill, devices, BENCH_RATE=str(SENTENCES_PER_SECOND))
            goal = devices * SENTENCES_PER_SECOND
            documents = repeated(texts, round(goal * seconds))
            mill_rate(mill, documents[: devices * PACED_SHARD], PACED_SHARD)  # what a process does once, it has done
            reached = [mill_rate(mill, documents, PACED_SHARD) for _ in range(rounds)]
            found[devices] = [status.documents_per_second / goal for status in reached]
    return found


def paced_310p3(corpus: Corpus, seconds: float, rounds: int) -> dict[str, Any]:
    """One simulated 310P3 by its published figures.

    ``busy``: the share of a run's seconds for which the device itself was busy, by its own account, which is at most 1
    but for what the clock of the run leaves out at its ends. ``of_ideal``: documents a second as a share of those of
    one greedy packing of the whole corpus, which another order of the windows can beat: it may be above 1.
    """
    costs = load_costs(COSTS)
    shapes = best_shapes(corpus.lengths, costs, COMPILED)
    manifest = replace(load_manifest(resolve_artifact("demo")), layout="packed", shapes=shapes)
    ideal = batches(corpus.lengths, costs, manifest, waiting=len(corpus.lengths))
    rate = len(corpus.texts) / ideal.seconds
    compiled = ",".join(f"{rows}x{length}" for rows, length in shapes)
    busy: list[float] = []
    of_ideal: list[float] = []
    with _mill() as mill:
        account = mill.folder / "busy"
        account.write_text("0", "utf-8")
        _start(mill, 1, BENCH_COSTS=COSTS, BENCH_SHAPES=compiled, BENCH_BUSY=str(account))
        documents = repeated(corpus.texts, round(rate * seconds))
        for _ in range(rounds):
            before = float(account.read_text("utf-8"))
            status = mill_rate(mill, documents)
            busy.append((float(account.read_text("utf-8")) - before) / status.seconds)
            of_ideal.append(status.documents_per_second / rate)
    return {
        "simulation": costs.source,
        "ideal_documents_per_second": rate,
        "shapes": shapes,
        "busy": busy,
        "of_ideal": of_ideal,
    }


def mill_rate(mill: Harness, texts: Sequence[str], documents_per_shard: int | None = None) -> Status:
    """Sends a run over the texts and follows it to its end."""
    size = documents_per_shard or ShardLimits().documents
    out = tempfile.mkdtemp(dir=mill.out)
    run, plan = mill.submit(list(texts), documents_per_shard=size, out=out)
    return mill.wait(run, plan, timeout=600)


def padding(corpus: Corpus, layout: str) -> float:
    """Padding share of a corpus that waits as a whole, rows packed (``packed``) or lengths sorted (``plain``)."""
    artifact = resolve_artifact("demo")
    manifest = replace(load_manifest(artifact), layout=layout)  # type: ignore[arg-type]
    pipeline = Pipeline(NullEngine(manifest), Tokenizer.from_file(str(artifact / TOKENIZER_FILE)))
    documents = [Document(str(number), text) for number, text in enumerate(corpus.texts)]
    try:
        stats = pipeline.annotate(shard_table(documents), Options()).stats
    finally:
        pipeline.close()
    return 1 - stats.tokens / stats.computed_tokens


@contextmanager
def _mill() -> Iterator[Harness]:
    with tempfile.TemporaryDirectory(prefix="mill-") as folder, harness(Path(folder), lease_seconds=60.0) as mill:
        yield mill


def _start(mill: Harness, processes: int, **environment: str) -> None:
    """Brings the mill to so many workers, all of them ready."""
    while len(mill.workers) < processes:
        mill.worker(APP, **environment)
    deadline = time.monotonic() + 120
    while not all(map(_is_ready, mill.workers)):
        if time.monotonic() > deadline or not all(worker.is_alive for worker in mill.workers):
            raise SystemExit(f"a worker does not come up\n{mill.logs()}")
        time.sleep(0.1)


def _is_ready(worker: Worker) -> bool:
    return "ready:" in worker.log.read_text(errors="replace")


def _processor_seconds(worker: Worker) -> float:
    fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
