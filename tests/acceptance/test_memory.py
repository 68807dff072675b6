"""The memory of a worker over 200,000 documents: flat once it is warm."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from nermill.worker.contracts.layout import SUCCESS_FILE
from tests.harness import harness, texts

DOCUMENTS = 200_000
DOCUMENTS_PER_SHARD = 256
WARM_SHARE = 0.2  # of the shards, after which memory should grow no more
GROWTH = 1.05


@pytest.mark.timeout(1800)
def test_a_workers_memory_stays_flat() -> None:
    with tempfile.TemporaryDirectory(prefix="nm-") as folder, harness(Path(folder), lease_seconds=60) as fleet:
        run, plan = fleet.submit(texts(DOCUMENTS), documents_per_shard=DOCUMENTS_PER_SHARD)
        worker = fleet.worker()
        process = psutil.Process(worker.process.pid)
        samples: list[int] = []
        began = time.monotonic()
        while not run.exists(SUCCESS_FILE):
            assert worker.is_alive, fleet.logs()
            assert time.monotonic() - began < 1500, fleet.logs()
            if len(run.committed()) >= WARM_SHARE * len(plan.shards):
                samples.append(process.memory_info().rss)
            time.sleep(0.5)
        seconds = time.monotonic() - began
    tenth = max(5, len(samples) // 10)
    first, last = statistics.median(samples[:tenth]), statistics.median(samples[-tenth:])
    print(
        f"{DOCUMENTS} documents in {seconds:.0f} s: {first / 2**20:.0f} MiB when warm, {last / 2**20:.0f} MiB at the "
        f"end ({last / first - 1:+.1%}), {max(samples) / 2**20:.0f} MiB at most, {len(samples)} samples"
    )
    assert last <= first * GROWTH
    assert max(samples) <= first * (GROWTH + 0.05)
