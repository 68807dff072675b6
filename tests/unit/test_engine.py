"""Engines: inputs by name, golden windows in a batch, the batch's size, and what the onnx engine does not import."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nermill.worker.contracts.errors import ArtifactError, EngineError
from nermill.worker.contracts.manifest import GraphInput, load_manifest, resolve_artifact
from nermill.worker.engine import Batch, load_engine, warmup
from nermill.worker.engine.golden import Golden, golden_difference, lay_rows, load_golden, run_alone, smallest_shape
from nermill.worker.engine.inputs import check_names, named_inputs
from nermill.worker.engine.warmup import token_budget
from nermill.worker.tagging import pipeline
from tests.doubles.engine import HashEngine, manifest

PLAIN = ("input_ids", "attention_mask", "token_type_ids")


def test_rows_hold_their_windows_one_behind_another() -> None:
    batch = lay_rows([[(5, 6, 7), (8, 9)], [(4,)]], (2, 6), replace(manifest(), position_offset=2))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 0], [4, 0, 0, 0, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[2, 3, 4, 2, 3, 0], [2, 0, 0, 0, 0, 0]]


def test_plain_inputs_are_derived_and_come_in_the_graphs_order_and_type() -> None:
    plain = replace(manifest(layout="plain"), inputs=tuple(GraphInput(name, "int32") for name in reversed(PLAIN)))
    feeds = named_inputs(lay_rows([[(5, 6)], [(4,)]], (2, 3), plain), plain)
    assert list(feeds) == list(reversed(PLAIN))
    assert {array.dtype for array in feeds.values()} == {np.dtype("int32")}
    assert feeds["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert not feeds["token_type_ids"].any()


def test_shape_that_was_not_compiled() -> None:
    fixed = manifest(((2, 16), (1, 32)))
    with pytest.raises(EngineError, match="shape 3x16 was not compiled; double takes 2x16, 1x32"):
        named_inputs(lay_rows([], (3, 16), fixed), fixed)
    assert smallest_shape(16, fixed) == (2, 16)
    assert smallest_shape(17, fixed) == (1, 32)
    with pytest.raises(ArtifactError, match="no compiled shape takes 33 tokens"):
        smallest_shape(33, fixed)


def test_names_of_a_graph() -> None:
    check_names(manifest(), ["input_ids", "segments", "position_ids"])
    with pytest.raises(ArtifactError, match="the graph takes segments, input_ids, position_ids and the manifest says"):
        check_names(manifest(), ["segments", "input_ids", "position_ids"])
    with pytest.raises(ArtifactError, match="are not those of the layout packed"):
        check_names(replace(manifest(), inputs=tuple(GraphInput(name, "int64") for name in PLAIN)), list(PLAIN))


def test_golden_answers_are_kept_and_compared(tmp_path: Path) -> None:
    engine = HashEngine(manifest(((2, 16),)))
    windows = ((101, 7, 8, 102), (101, 102))
    golden = Golden(("a b", ""), windows, tuple(run_alone(engine, windows)))
    golden.write(tmp_path)
    read = load_golden(tmp_path)
    assert (read.texts, read.windows) == (golden.texts, golden.windows)
    assert golden_difference(engine, read) < 1e-6
    shifted = Golden(golden.texts, windows, tuple(logits + 0.5 for logits in golden.logits))
    assert golden_difference(engine, shifted) == pytest.approx(0.5, abs=1e-6)
    broken = Golden(golden.texts, windows, tuple(logits * np.nan for logits in golden.logits))
    assert golden_difference(engine, broken) == float("inf")


def test_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nermill.worker.engine.onnx", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ArtifactError, match="needs onnxruntime, which is not installed; pip install"):
        load_engine(resolve_artifact("demo"))


def test_onnx_engine_imports_neither_torch_nor_transformers(root: Path) -> None:
    pytest.importorskip("onnxruntime")
    code = (
        "import sys; from pathlib import Path; from nermill.worker import Tagger;"
        "found = Tagger.load('demo', threads=1).tag(['Angela Merkel met Barack Obama in Berlin.'])[0].entities;"
        "print([(e.text, e.label) for e in found]);"
        "assert {'torch', 'transformers', 'onnx'}.isdisjoint(sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "[('Angela Merkel', 'PER'), ('Barack Obama', 'PER'), ('Berlin', 'LOC')]"


class Card(HashEngine):
    """An accelerator that takes the same time for every batch up to a size, by a simulated clock."""

    device = "cuda:0"

    def __init__(self, *, busy: int, memory: int = 1 << 30, **layout: Any) -> None:
        super().__init__(manifest(**layout))
        self._busy = busy
        self._memory = memory
        self._now = 0.0

    def run(self, batch: Batch) -> NDArray[np.float32]:
        if batch.input_ids.size > self._memory:
            raise EngineError("out of memory")
        self._now += max(batch.input_ids.size, self._busy)
        return np.zeros((*batch.input_ids.shape, 1), np.float32)

    def perf_counter(self) -> float:
        return self._now


@pytest.mark.parametrize(
    ("card", "budget"),
    [
        (Card(busy=10), 256),
        (Card(busy=5_000), 8_192),
        (Card(busy=5_000, layout="plain"), 8_192),
        (Card(busy=5_000, memory=3_000), 2_048),
        (Card(busy=1 << 20), 16_384),
        (Card(busy=5_000, shapes=((4, 64),)), 256),
    ],
)
def test_an_accelerator_gets_batches_of_the_size_that_keeps_it_busy(
    card: Card, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warmup, "time", card)
    assert token_budget(card) == budget


def test_a_cpu_takes_the_artifacts_word() -> None:
    cpu = HashEngine(manifest())
    assert token_budget(cpu) == 256
    assert not cpu.batches


def test_an_accelerator_that_takes_no_batch_at_all() -> None:
    with pytest.raises(EngineError, match="out of memory"):
        token_budget(Card(busy=10, memory=100))


def test_the_worker_batches_as_large_as_its_device_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "token_budget", lambda engine: 4 * engine.manifest.token_budget)
    artifact = resolve_artifact("demo")
    loaded = pipeline.load_pipeline(artifact)
    try:
        assert loaded.manifest.token_budget == 4 * load_manifest(artifact).token_budget
    finally:
        loaded.close()
