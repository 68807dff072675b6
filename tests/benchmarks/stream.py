"""``python -m tests.benchmarks.stream``: a document's time from its line on standard input to its durable part."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nermill.producer.runs.run import open_run
from nermill.worker.contracts.layout import part_name
from tests.benchmarks.corpora import default_data, read_corpora
from tests.harness import REAL, Harness, harness, texts

LINGERS = (0.05, 1.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, a row for each linger."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.stream", description=__doc__)
    parser.add_argument("--rate", type=float, default=200.0, help="documents a second; default %(default)s")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each linger; default %(default)s")
    parser.add_argument("--data", type=Path, default=default_data(), help="CoNLL file; default %(default)s")
    options = parser.parse_args(arguments)
    documents = round(options.rate * options.seconds)
    sentences = read_corpora(options.data, documents)["sentences"].texts
    lines = [json.dumps({"text": sentences[n % len(sentences)]}) + "\n" for n in range(documents)]
    print("| --linger | documents | documents/s in | median | p99 | longest |\n|---|---|---|---|---|---|")
    for linger in LINGERS:
        taken, rate = latencies(lines, options.rate, linger)
        median, p99, longest = np.quantile(taken, [0.5, 0.99, 1.0])
        print(
            f"| {linger * 1000:,.0f} ms | {len(taken):,} | {rate:.0f} "
            f"| {median * 1000:,.0f} ms | {p99 * 1000:,.0f} ms | {longest * 1000:,.0f} ms |",
            flush=True,
        )


def latencies(lines: Sequence[str], rate: float, linger: float) -> tuple[NDArray[np.float64], float]:
    """Streams lines at an even pace into one worker with the demo model.

    Returns:
        Seconds from a line's writing to the moment its part is durable, by document, and the lines/s that were sent.
    """
    with tempfile.TemporaryDirectory(prefix="nm-") as folder, harness(Path(folder), lease_seconds=60.0) as mill:
        mill.worker(REAL).await_ready()
        mill.wait(*mill.submit(texts(64)))  # what the first documents pay, ours do not
        command = [sys.executable, "-m", "nermill.producer.cli", "submit", "-", "--linger", str(linger), "--json"]
        command += ["--out", f"{mill.out}/stream", "--broker", mill.server.url]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as sender:
            assert sender.stdin is not None
            assert sender.stderr is not None
            opened = sender.stderr.readline().decode()
            assert "stream open" in opened, opened
            begun = time.time()
            sent = np.empty(len(lines))
            for number, line in enumerate(lines):
                time.sleep(max(0.0, begun + number / rate - time.time()))
                sent[number] = time.time()
                os.write(sender.stdin.fileno(), line.encode())
            sender.stdin.close()
        return _durable(mill, opened.rsplit(" ", 1)[-1].strip()) - sent, (len(lines) - 1) / (sent[-1] - begun)


def _durable(mill: Harness, uri: str) -> NDArray[np.float64]:
    """When each document's part was durable, as Unix seconds: a part's inode changes last when it got its name."""
    run, plan = open_run(uri)
    mill.wait(run, plan, timeout=600)
    moments = [os.stat(run.path(part_name(shard.index))).st_ctime for shard in plan.shards]
    return np.repeat(moments, [shard.documents for shard in plan.shards])


if __name__ == "__main__":
    main()
