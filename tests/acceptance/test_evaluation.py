"""A million sentences evaluated: in constant memory, in the seconds that it prints."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nermill.worker.contracts.layout import REPORT_JSON, RunFolder, part_name
from nermill.worker.contracts.plan import Shard, read_plan
from nermill.worker.contracts.schema import METADATA_PREFIX
from tests.unit.evaluation.runs import Doc, make_run, stats_of

PARTS, PER_PART = 50, 20_000
MOST_MIB = 500
TAGS = ("O", "O", "O", "O", "B-PER", "I-PER", "B-LOC", "B-ORG", "I-ORG")


def million_sentences(folder: Path) -> RunFolder:
    """A run of fifty parts with the same words and tags, but documents of their own."""
    rng = random.Random(5)
    docs = []
    for _ in range(PER_PART):
        gold = [rng.choice(TAGS) for _ in range(rng.randint(3, 35))]
        tags = [rng.choice(TAGS) if rng.random() < 0.05 else tag for tag in gold]
        docs.append(Doc([f"word{rng.randint(0, 30_000)}" for _ in gold], tags, gold))
    run = make_run(folder, docs, per_shard=PER_PART)
    table = pq.read_table(run.path(part_name(0)))
    shards = []
    for shard in range(PARTS):
        first = shard * PER_PART
        index = range(first, first + PER_PART)
        part = table.set_column(0, table.schema.field(0), pa.array(index, pa.int64()))
        part = part.set_column(1, table.schema.field(1), pa.array([f"doc:{n}" for n in index]))
        stats = {METADATA_PREFIX + "stats": json.dumps(stats_of(shard, PER_PART))}
        part = part.replace_schema_metadata({**(table.schema.metadata or {}), **stats})
        pq.write_table(part, run.path(part_name(shard)), compression="zstd")
        shards.append(Shard(shard, first, PER_PART, "0" * 64))
    replace(read_plan(run), shards=tuple(shards)).write(run)
    return run


@pytest.mark.timeout(600)
def test_a_million_sentences_fit_into_memory(tmp_path: Path) -> None:
    run = million_sentences(tmp_path)
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "nermill.producer.cli", "evaluate", run.uri], stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    seconds, mib = time.monotonic() - began, used.ru_maxrss / 1024
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    report = json.loads(run.read(REPORT_JSON))
    sentences = report["scored_documents"]
    print(f"{sentences:,} sentences in {seconds:.1f} s, {seconds / sentences * 1e5:.2f} s per 100,000; {mib:.0f} MiB")
    assert sentences == PARTS * PER_PART
    assert 0 < report["f1_interval"][0] < report["f1"] < report["f1_interval"][1] < 1
    assert mib <= MOST_MIB
