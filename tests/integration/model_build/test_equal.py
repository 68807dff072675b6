"""Layout ``equal`` and fixed scales: the checkpoint's answers, and not one bit from a window's neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import onnx
from tokenizers import Tokenizer

from nermill.model_build.advice import advise
from nermill.model_build.artifact import Order, compile_artifact
from nermill.model_build.calibration import MOST_WINDOWS, calibration_windows
from nermill.model_build.checkpoint import open_checkpoint
from nermill.model_build.int8 import divisors, input_scale
from nermill.model_build.reference import reference_logits, windows_of
from nermill.model_build.shapes import compare_equal
from nermill.model_build.verify import run_batched, verify
from nermill.worker.contracts.costs import Costs
from nermill.worker.contracts.errors import ArtifactError, EngineError, UsageError
from nermill.worker.contracts.manifest import TOKENIZER_FILE, load_manifest, resolve_artifact
from nermill.worker.engine import load_engine
from nermill.worker.engine.golden import lay_rows, run_alone
from tests.bits import batched, same_bits, sample_windows, shuffled
from tests.checkpoints import FAMILIES, MAX_LENGTH

TEXTS = ["george washington went to washington.", "oslo", "a very long train (of thought) left paris at 10.45"]
SENTENCES = 3250
ALONE = 300


@pytest.mark.parametrize("backend", ["onnx", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_its_checkpoint(
    make_checkpoint: Callable[..., Path], tmp_path: Path, family: str, backend: str
) -> None:
    folder = make_checkpoint(family)
    manifest = compile_artifact(str(folder), tmp_path / "art", Order(backend, "equal"))  # type: ignore[arg-type]
    assert ([entry.name for entry in manifest.inputs], manifest.layout) == (["input_ids"], "equal")
    checkpoint = open_checkpoint(str(folder))
    windows = windows_of(checkpoint, TEXTS, MAX_LENGTH)
    engine = load_engine(tmp_path / "art", "cpu", 2)
    for mine in (run_batched(engine, windows), run_alone(engine, windows)):
        for logits, theirs in zip(mine, reference_logits(checkpoint, windows), strict=True):
            np.testing.assert_allclose(logits, theirs, atol=1e-4)
    with pytest.raises(EngineError, match="takes rows that one window fills each"):
        engine.run(lay_rows([[windows[0][:5]]], (1, 9), replace(manifest, layout="packed")))
    engine.close()
    assert all(check.passed for check in verify(tmp_path / "art"))


@pytest.mark.timeout(600)
def test_no_bit_of_the_bundled_models_answers_comes_from_a_windows_neighbours(sample: Path) -> None:
    artifact = resolve_artifact("demo")
    windows = sample_windows(artifact, sample, SENTENCES)
    engine = load_engine(artifact)
    windows, expected = shuffled(windows, run_batched(engine, windows))
    same_bits(batched(engine, windows, 100), expected)
    same_bits(run_alone(engine, windows[:ALONE]), expected[:ALONE])
    engine.close()


def test_fixed_scales_leave_the_product_and_one_step_before_it(
    bert: Path, compiled: Callable[..., Path], tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS), "utf-8")
    fixed = compiled("onnx", precision="int8", calibrate=str(texts))
    manifest = load_manifest(fixed)
    assert manifest.details["calibration"] == {"texts": "3 texts of texts.txt", "windows": 3}
    operators = Counter(node.op_type for node in onnx.load(fixed / "model.onnx").graph.node)
    products = operators["MatMulIntegerToFloat"]
    assert operators["QuantizeLinear"] == products
    assert not {"Abs", "ReduceMax", "Softmax", "MatMul"} & operators.keys()
    dynamic = onnx.load(compiled("onnx", precision="int8") / "model.onnx").graph.node
    assert Counter(node.op_type for node in dynamic)["Abs"] == products
    windows = windows_of(open_checkpoint(str(bert)), TEXTS, MAX_LENGTH)
    engine = load_engine(fixed, "cpu", 1)
    for logits, theirs in zip(
        run_batched(engine, windows), reference_logits(open_checkpoint(str(bert)), windows), strict=True
    ):
        np.testing.assert_allclose(logits, theirs, atol=manifest.tolerance)
    engine.close()
    assert all(check.passed for check in verify(fixed, threads=1))


def test_scales_by_hand() -> None:
    scale, zero_point = input_scale(-1.0, 1.55)
    assert float(scale) == pytest.approx(0.01)
    assert zero_point == 100
    assert input_scale(0.0, 0.0)[1] == 0
    usual = np.linspace(0.5, 1.0, 200, dtype=np.float32)
    assert (divisors(usual) == 1).all()
    largest = np.append(usual, np.float32(20.0))
    divided = largest / divisors(largest)
    assert divided.max() == pytest.approx(np.quantile(largest, 0.99))
    assert (divisors(largest)[:190] == 1).all()


def test_calibration_windows_are_spread_over_the_file(tmp_path: Path) -> None:
    artifact = resolve_artifact("demo")
    manifest = load_manifest(artifact)
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"The {n} winters of {n % 97} rivers flow by .\n" for n in range(20_000)), "utf-8")
    windows, told = calibration_windows(str(texts), artifact, manifest, [])
    assert (len(windows), told["calibration"]["texts"]) == (MOST_WINDOWS, "20000 texts of texts.txt")
    assert len(set(map(tuple, windows))) == MOST_WINDOWS
    assert all(window[0] == manifest.cls_id and window[-1] == manifest.sep_id for window in windows)
    tokenizer = Tokenizer.from_file(str(artifact / TOKENIZER_FILE))
    last = tokenizer.decode(list(windows[-1]))
    assert int(last.split()[1]) > 19_000


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (Order("onnx", "equal", "fp16"), "--layout equal: is for CPUs and free shapes"),
        (Order("torch", "equal", shapes="2x32"), "--layout equal: is for CPUs and free shapes"),
        (Order("om", "equal"), "--layout equal: is for CPUs and free shapes"),
        (Order("onnx", precision="fp32", calibrate="texts.txt"), "--calibrate: onnx fp32 has no scales to find"),
    ],
)
def test_what_does_not_go_together_is_refused(bert: Path, tmp_path: Path, order: Order, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compile_artifact(str(bert), tmp_path / "art", order)
    assert not (tmp_path / "art").exists()


@pytest.mark.parametrize("layout", ["packed", "plain"])
def test_scales_are_found_whatever_shapes_are_compiled(
    compiled: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS), "utf-8")
    artifact = compiled("onnx", precision="int8", layout=layout, shapes="2x64", calibrate=str(texts))
    assert load_manifest(artifact).details["calibration"]["windows"] == 3
    assert all(check.passed for check in verify(artifact, threads=1))


def test_a_table_of_costs_by_hand() -> None:
    seconds = {(4, 10): 0.4, (2, 20): 0.6}  # 0.01 and 0.015 a token
    costs = Costs("table", "measured", "", seconds, "equal", is_free=True)
    assert (costs.way, costs.ways) == ("equal", ("padded", "equal"))
    ways = compare_equal(np.array([5, 10, 11, 20]), costs)
    assert ways["equal"].seconds == pytest.approx(15 * 0.01 + 31 * 0.015)
    assert ways["padded"].seconds == pytest.approx(4 * 0.3)
    assert ways["equal"].fill == 1.0
    assert ways["padded"].fill == pytest.approx(46 / 80)


def test_there_are_no_shapes_to_choose_from_a_table_of_every_length() -> None:
    artifact = resolve_artifact("demo")
    with pytest.raises(UsageError, match="its graph takes every length without padding"):
        advise([], 2, str(artifact / "bench.json"), artifact, None)


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_another_device_is_refused(
    compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    artifact = compiled(backend, layout="equal")
    with pytest.raises(ArtifactError, match="layout equal is for CPUs; for cuda:0 compile with --layout packed"):
        load_engine(artifact, "cuda:0")
