"""The NPU backend against a strict double of the documented API: what it refuses, and that nothing we do is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from nermill.model_build.artifact import Order, compile_artifact
from nermill.model_build.checkpoint import open_checkpoint
from nermill.model_build.export import example_inputs
from nermill.model_build.reference import windows_of
from nermill.model_build.verify import run_packed
from nermill.worker.contracts.errors import ArtifactError, EngineError, UsageError
from nermill.worker.engine import load_engine
from nermill.worker.engine.encoder import build
from nermill.worker.engine.golden import lay_rows
from tests.doubles import mindie

TEXTS = ["george washington went to washington.", "oslo", "a train left paris at 10.45"]
SHAPES = "2x64,1x64"


@pytest.fixture
def bert_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("bert", max_position_embeddings=128)


@pytest.mark.parametrize("name", ["mindietorch", "torch_aie"])
@pytest.mark.parametrize("dtype", ["int64", "int32"])
@pytest.mark.parametrize("layout", ["packed", "plain"])
def test_compile_save_load_run_finalize(
    bert_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str, layout: str
) -> None:
    double = mindie.install(monkeypatch, name)
    order = Order("aie", shapes=SHAPES, index_dtype=dtype, layout=layout)  # type: ignore[arg-type]
    manifest = compile_artifact(str(bert_checkpoint), tmp_path / "aie", order)
    assert (manifest.precision, manifest.shapes) == ("fp16", ((2, 64), (1, 64)))
    expected = {"package": name, "soc": "Ascend310P3", "whole_graph": True, "precision_policy": "FP16"}
    assert expected.items() <= manifest.details.items()
    assert double.options[0]["gears"] == [(2, 64), (1, 64)]
    assert double.options[0]["require_full_compilation"] is True
    assert [c for c in double.calls if c not in ("forward", "synchronize")] == [
        "set_device(0)", "compile", "save", "set_device(0)", "load", "finalize",
    ]  # fmt: skip
    assert double.violations == []


def test_answers_as_the_torch_engine(bert_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_artifact(str(bert_checkpoint), tmp_path / "torch", Order("torch", shapes=SHAPES))
    windows = windows_of(open_checkpoint(str(bert_checkpoint)), TEXTS, 64)
    engine = load_engine(tmp_path / "torch", "cpu", 1)
    expected = run_packed(engine, windows)
    mindie.install(monkeypatch)
    compile_artifact(str(bert_checkpoint), tmp_path / "aie", Order("aie", shapes=SHAPES))
    double = mindie.install(monkeypatch)  # the worker is another process
    on_npu = load_engine(tmp_path / "aie", "npu:3")
    for mine, theirs in zip(run_packed(on_npu, windows), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    with pytest.raises(EngineError, match="2x32 was not compiled"):
        on_npu.run(lay_rows([], (2, 32), on_npu.manifest))
    on_npu.close()
    assert double.calls[:2] == ["set_device(3)", "load"]
    assert double.calls[-1] == "finalize"
    assert double.violations == []


def test_partly_compiled_module_that_answers_on_the_cpu(
    bert_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    double = mindie.install(monkeypatch, partial=True)
    manifest = compile_artifact(str(bert_checkpoint), tmp_path / "aie", Order("aie", shapes="1x64"))
    assert manifest.details["whole_graph"] is False
    assert [options["require_full_compilation"] for options in double.options] == [True, False]
    assert double.violations == []


def test_compiler_that_gives_up_leaves_nothing(
    bert_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mindie.install(monkeypatch, broken=True)
    with pytest.raises(EngineError, match="mindietorch does not compile it: aten::clamp is not supported"):
        compile_artifact(str(bert_checkpoint), tmp_path / "aie", Order("aie", shapes="1x64"))
    assert list(tmp_path.iterdir()) == []


def test_without_the_package(bert_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs mindietorch"):
        compile_artifact(str(bert_checkpoint), tmp_path / "aie", Order("aie", shapes="1x64"))
    assert list(tmp_path.iterdir()) == []


def test_worker_without_the_package_or_with_another_device(
    bert_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        mindie.install(patch)
        compile_artifact(str(bert_checkpoint), tmp_path / "aie", Order("aie", shapes="1x64"))
    with pytest.raises(ArtifactError, match="needs mindietorch, which is not installed"):
        load_engine(tmp_path / "aie", "npu:0")
    mindie.install(monkeypatch)
    with pytest.raises(ArtifactError, match="compiled for Ascend NPUs; device 'cpu' cannot run it"):
        load_engine(tmp_path / "aie", "cpu")


@pytest.mark.parametrize("shapes", ["1x100", "65x64", "1x1600"])
def test_shapes_that_ascend_does_not_take(make_checkpoint: Callable[..., Path], tmp_path: Path, shapes: str) -> None:
    folder = make_checkpoint("bert", max_position_embeddings=2048)
    with pytest.raises(UsageError, match=f"--shapes {shapes}: AscendIE takes at most 64 rows"):
        compile_artifact(str(folder), tmp_path / "aie", Order("aie", shapes=shapes))


class TestDouble:
    """The double itself refuses what the documentation does not allow."""

    @pytest.fixture
    def double(self, monkeypatch: pytest.MonkeyPatch) -> mindie.Double:
        return mindie.install(monkeypatch)

    @pytest.fixture
    def traced(self, bert: Path) -> torch.jit.ScriptModule:
        checkpoint = open_checkpoint(str(bert))
        model = build(checkpoint.architecture, checkpoint.weights())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.trace(model, example_inputs(model, torch.int64, (1, 64)), check_trace=False)

    def inputs(self, dtype: torch.dtype = torch.int64, form: mindie.TensorFormat = mindie.TensorFormat.ND) -> list:
        return [mindie.Input((1, 64), dtype=dtype, format=form) for _ in range(3)]

    def test_call_before_set_device(self, double: mindie.Double, traced: torch.jit.ScriptModule) -> None:
        with pytest.raises(RuntimeError, match="compile before set_device"):
            double.compile(traced, inputs=self.inputs())
        with pytest.raises(RuntimeError, match="a copy to the NPU before set_device"):
            torch.ones(1).to("npu:0")

    def test_undeclared_dtype_format_and_keyword(self, double: mindie.Double, traced: torch.jit.ScriptModule) -> None:
        double.set_device(0)
        with pytest.raises(RuntimeError, match=r"declared as torch\.float32"):
            double.compile(traced, inputs=[mindie.Input((1, 64), format=mindie.TensorFormat.ND) for _ in range(3)])
        with pytest.raises(RuntimeError, match="ids are ND"):
            double.compile(traced, inputs=self.inputs(form=mindie.TensorFormat.NCHW))
        with pytest.raises(TypeError, match="unknown keyword name"):
            double.compile(traced, inputs=self.inputs(), name="ner")

    def test_shape_device_and_order_of_a_forward(self, double: mindie.Double, traced: torch.jit.ScriptModule) -> None:
        double.set_device(0)
        compiled = double.compile(traced, inputs=self.inputs())
        stream = mindie.Stream(double, "npu:0")
        double.stream = stream
        with pytest.raises(RuntimeError, match="an input is on the wrong device"):
            compiled(*(torch.ones(1, 64, dtype=torch.int64) for _ in range(3)))
        with pytest.raises(RuntimeError, match="not among the gears"):
            compiled(*(torch.ones(1, 32, dtype=torch.int64).to("npu:0") for _ in range(3)))
        with pytest.raises(RuntimeError, match="compiled as another type"):
            compiled(*(torch.ones(1, 64, dtype=torch.int32).to("npu:0") for _ in range(3)))
        with pytest.raises(RuntimeError, match="a copy to npu:1 in a process of npu:0"):
            torch.ones(1).to("npu:1")
        answer = compiled(*(torch.ones(1, 64, dtype=torch.int64).to("npu:0") for _ in range(3)))
        with pytest.raises(RuntimeError, match="before its stream was synchronized"):
            answer.to("cpu")
        with pytest.raises(RuntimeError, match="numpy of a tensor on the NPU"):
            answer.numpy()
        stream.synchronize()
        assert answer.to("cpu").numpy().shape == (1, 64, 5)
        double.finalize()
        with pytest.raises(RuntimeError, match="finalize twice"):
            double.finalize()
