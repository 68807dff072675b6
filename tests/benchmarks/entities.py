"""``python -m tests.benchmarks.entities [DOCUMENTS]``: seconds and memory of redact and publish over a large run."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet as pq

from nermill.worker.contracts.layout import SUCCESS_FILE, RunFolder, part_name
from nermill.worker.contracts.plan import Options, Plan, Shard
from nermill.worker.contracts.schema import part_schema, with_metadata

SHARD_DOCUMENTS = 1024
NAMES = 200_000  # distinct ones: they all stand in the key of pseudonyms
COMMANDS = (
    "redact {run} --to {folder}/labels.jsonl",
    "redact {run} --to {folder}/names.jsonl --with pseudonym --key {folder}/names.key",
    "restore {folder}/names.jsonl --key {folder}/names.key --to {folder}/back.jsonl",
    "redact {run} --to {folder}/labels.parquet",
    "publish {run} {folder}/documents",
    "publish {run} {folder}/entities --layout entities",
)


def main(documents: int) -> None:
    """Prints what was measured: seconds, and the largest resident memory of the command's process."""
    with tempfile.TemporaryDirectory(prefix="nm-") as folder:
        run = _make_run(Path(folder), documents)
        print(f"{documents:,} documents of 120 characters and two entities in {len(run.committed()):,} parts")
        for command in COMMANDS:
            words = command.format(run=run.uri, folder=folder).split()
            begun = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-c", _WITH_PEAK, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            _, err = process.communicate()
            assert process.returncode == 0, err
            name = command.replace("{run}", "RUN").replace("{folder}/", "")
            print(f"{time.perf_counter() - begun:7.1f} s  {int(err.split()[-1]) / 1024:6.0f} MiB  nermill {name}")


_WITH_PEAK = """
import atexit, resource, sys
peak = lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
atexit.register(peak)
from nermill.producer.cli import main
main()
"""


def _make_run(folder: Path, documents: int) -> RunFolder:
    run = RunFolder(str(folder / "run=large"))
    draw = random.Random(20)
    shards = []
    for index, first in enumerate(range(0, documents, SHARD_DOCUMENTS)):
        count = min(SHARD_DOCUMENTS, documents - first)
        rows = [_row(number, f"Name{draw.randrange(NAMES):06}") for number in range(first, first + count)]
        schema = with_metadata(part_schema(keep_text=True, keep_fields=False), run_id="large", model="made")
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema), sink, compression="zstd")
        run.write(part_name(index), sink.getvalue().to_pybytes())
        shards.append(Shard(index, first, count, "0" * 64))
    model = {"name": "made", "sha256": ""}
    Plan("large", "2026-01-01T00:00:00Z", model, Options(keep_text=True), (), tuple(shards)).write(run)
    run.write(SUCCESS_FILE, b"")
    return run


def _row(number: int, name: str) -> dict:
    text = f"{name} came to London, where nobody knew of it, and so the day went by without a word. ".ljust(120, ".")
    spans = ((0, len(name), "PER"), (len(name) + 9, len(name) + 15, "LOC"))
    entities = [{"start": a, "end": b, "label": label, "text": text[a:b], "score": 0.9} for a, b, label in spans]
    return {
        "doc_index": number, "doc_id": f"d{number}", "n_chars": len(text), "n_tokens": 20, "n_windows": 1,
        "status": "ok", "entities": entities, "text": text,
    }  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 1_000_000)
