"""``nermill-build export``: the graph alone, with named inputs in a stated order, checked before it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import onnx
import onnxruntime
import torch

from nermill.model_build import cli
from nermill.model_build.checkpoint import open_checkpoint
from nermill.model_build.reference import reference_logits, windows_of
from nermill.worker.engine.aie import load_script

INPUTS = {
    "packed": ["input_ids", "segments", "position_ids"],
    "plain": ["input_ids", "attention_mask", "token_type_ids"],
}


@pytest.fixture
def build(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs ``nermill-build``; returns exit code, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["nermill-build", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        streams = capsys.readouterr()
        return int(exit_.value.code or 0), streams.out, streams.err

    return run


def arrays(layout: str, ids: tuple[int, ...], dtype: type, length: int, offset: int = 0) -> list[np.ndarray[Any, Any]]:
    """One window in a row of ``length`` tokens, in the stated order of the inputs."""
    padded: np.ndarray[Any, Any] = np.zeros((1, length), dtype)
    padded[0, : len(ids)] = ids
    seen: np.ndarray[Any, Any] = np.zeros((1, length), dtype)
    seen[0, : len(ids)] = 1
    third: np.ndarray[Any, Any] = np.zeros((1, length), dtype)
    if layout == "packed":
        third[0, : len(ids)] = np.arange(len(ids)) + offset
    return [padded, seen, third]


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
@pytest.mark.parametrize("layout", ["packed", "plain"])
@pytest.mark.parametrize(("shapes", "dtype"), [("auto", np.int64), ("1x48", np.int32), ("1x32,1x64", np.int64)])
def test_what_a_foreign_tool_chain_gets(
    bert: Path, tmp_path: Path, build: Callable[..., Any], form: str, layout: str, shapes: str, dtype: type
) -> None:
    out = tmp_path / "made" / "graph"
    options = ["--format", form, "--layout", layout, "--shapes", shapes, "--index-dtype", np.dtype(dtype).name]
    code, said, errors = build("export", str(bert), "--out", str(out), "--json", *options)
    assert (code, errors) == (0, "")
    told = json.loads(said)
    assert [entry["name"] for entry in told["inputs"]] == INPUTS[layout]
    assert {entry["dtype"] for entry in told["inputs"]} == {np.dtype(dtype).name}
    assert told["difference"] < 1e-3
    assert np.isfinite(np.float16(told["masked"]))
    assert list((tmp_path / "made").iterdir()) == [out]

    checkpoint = open_checkpoint(str(bert))
    length = 48 if shapes == "1x48" else 64
    (window,) = windows_of(checkpoint, ["george washington went to oslo"], length)
    feeds = arrays(layout, window, dtype, length)
    if form == "onnx":
        session = onnxruntime.InferenceSession(str(out))
        assert [entry.name for entry in session.get_inputs()] == INPUTS[layout]
        is_fixed = session.get_inputs()[0].shape == [1, 48]
        assert is_fixed == (shapes == "1x48")
        logits = session.run(None, dict(zip(INPUTS[layout], feeds, strict=True)))[0]
        assert "LayerNormalization" not in {node.op_type for node in onnx.load(out).graph.node}
    else:
        logits = load_script(out)(*map(torch.from_numpy, feeds)).numpy()
    (expected,) = reference_logits(checkpoint, [window])
    np.testing.assert_allclose(logits[0, : len(window)], expected, atol=1e-3)


def test_a_fixed_graph_has_no_arithmetic_about_shapes(bert: Path, tmp_path: Path, build: Callable[..., Any]) -> None:
    assert build("export", str(bert), "--out", str(tmp_path / "a.onnx"), "--shapes", "2x64")[0] == 0
    kinds = {node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node}
    assert {"MatMul", "Softmax", "Erf"} <= kinds
    assert not {"Shape", "Mod", "Range", "If", "Loop"} & kinds


def test_every_family_is_exported(
    make_checkpoint: Callable[..., Path], tmp_path: Path, build: Callable[..., Any]
) -> None:
    for family in ("roberta", "electra", "distilbert"):
        out = str(tmp_path / f"{family}.onnx")
        code, said, errors = build("export", str(make_checkpoint(family)), "--out", out, "--layout", "plain")
        assert (code, errors) == (0, "")
        assert "inputs       input_ids int64, attention_mask int64, token_type_ids int64, in this order" in said


def test_a_graph_that_answers_otherwise_is_not_written(
    bert: Path, tmp_path: Path, build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nermill.worker.engine.encoder.Encoder.masked", 0.0)  # tokens see their padding
    code, said, errors = build("export", str(bert), "--out", str(tmp_path / "a.onnx"), "--shapes", "2x64")
    assert (code, said) == (1, "")
    assert "away from the checkpoint's logits" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "tflite"), "--format tflite: nermill exports torchscript, onnx"),
        (("--layout", "ragged"), "--layout ragged: nermill builds packed, plain"),
        (("--shapes", "2x128"), "--shapes 2x128: the model reads at most 96 tokens"),
        (("--out", "{}/there"), "there: is there already; name a new file or remove it"),
        (("--out", "/proc/a/b"), "cannot be written"),
    ],
)
def test_wrong_input(
    bert: Path, tmp_path: Path, build: Callable[..., Any], options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "there").write_text("mine", "utf-8")
    given = [option.format(tmp_path) for option in options]
    code, said, errors = build("export", str(bert), "--out", str(tmp_path / "out.onnx"), *given)
    assert (code in (1, 2), said) == (True, "")
    (line,) = errors.splitlines()
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
