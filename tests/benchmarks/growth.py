"""``python -m tests.benchmarks.growth``: what a document costs the host, and where, when there are ten times as many.

The whole mill on the null engine: a server, one worker process, the ``nermill`` command as producer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from nermill.producer.runs.status import part_stats
from nermill.worker.contracts.layout import RunFolder
from tests.benchmarks.corpora import default_data, read_corpora
from tests.benchmarks.host import APP, repeated
from tests.harness import harness

SIZES = (10_000, 100_000, 1_000_000)
WARM_UP = 2_000
PROCESSES = ("producer", "worker", "server")
STAGES = ("tokenize", "wait", "compute", "decode", "write")


@dataclass(frozen=True)
class Cost:
    """What one run cost; ``peaks`` is each process's memory at its most, in bytes."""

    documents_per_second: float
    peaks: dict[str, int]
    stage_seconds: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints medians and highest peaks, a row for each size, and where the time of one shard at a time goes."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.growth", description=__doc__)
    parser.add_argument("--data", type=Path, default=default_data(), help="CoNLL file; default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each size; default %(default)s")
    parser.add_argument("sizes", nargs="*", type=int, default=SIZES, help="documents; default %(default)s")
    options = parser.parse_args(arguments)
    texts = read_corpora(options.data, 3250)["sentences"].texts
    rounds = [[measure(texts, count) for count in options.sizes] for _ in range(options.rounds)]
    print(f"| documents | documents/s | µs a document | {' | '.join(PROCESSES)} |\n|---|---|---|---|---|---|")
    for count, costs in zip(options.sizes, zip(*rounds, strict=True), strict=True):
        rate = median(cost.documents_per_second for cost in costs)
        peaks = [max(cost.peaks[process] for cost in costs) for process in PROCESSES]
        memory = " | ".join(f"{peak / 1e6:,.0f} MB" for peak in peaks)
        print(f"| {count:,} | {rate:,.0f} | {1e6 / rate:.1f} | {memory} |")
    stages = measure(texts, options.sizes[0], NERMILL_CONCURRENCY="1").stage_seconds
    print("\n| stage, one shard at a time | µs a document |\n|---|---|")
    for stage, seconds in stages.items():
        print(f"| {stage} | {1e6 * seconds:.1f} |")


def measure(texts: Sequence[str], count: int, **environment: str) -> Cost:
    """One run over so many documents by a fresh mill."""
    with tempfile.TemporaryDirectory(prefix="nm-") as folder, harness(Path(folder), lease_seconds=60.0) as mill:
        worker = mill.worker(APP, **environment)
        worker.await_ready()
        mill.wait(*mill.submit(repeated(texts, WARM_UP), out=f"{mill.out}/warm"))
        source = Path(folder) / "many.jsonl"
        with source.open("w", encoding="utf-8") as lines:  # not as one string: a child's peak begins with our size
            lines.writelines(json.dumps({"id": f"d{n}", "text": texts[n % len(texts)]}) + "\n" for n in range(count))
        command = [sys.executable, "-m", "nermill.producer.cli", "submit", str(source), "--wait", "--json"]
        command += ["--out", f"{mill.out}/run", "--broker", mill.server.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            said = json.load(process.stdout)
            _, _, usage = os.wait4(process.pid, 0)
        with mill.server.client() as client:
            server = int(client.info("memory")["used_memory_peak"])
        peak = int(Path(f"/proc/{worker.process.pid}/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
        stages = _stages(RunFolder(said["run"]), count)
        peaks = dict(zip(PROCESSES, (usage.ru_maxrss * 1024, peak, server), strict=True))
        return Cost(said["documents_per_second"], peaks, stages)


def _stages(run: RunFolder, documents: int) -> dict[str, float]:
    """Seconds a document, by stage, as the parts tell; what is left is reading, ledger and messages."""
    parts = [entry for shard in run.committed() for entry in part_stats(run, shard)]
    stages = {stage: sum(part.get(f"{stage}_seconds", 0.0) for part in parts) / documents for stage in STAGES}
    whole = max(part["finished"] for part in parts) - min(part["claimed"] for part in parts)
    return {**stages, "reading, ledger, message": whole / documents - sum(stages.values())}


if __name__ == "__main__":
    main()
