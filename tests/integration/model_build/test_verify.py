"""verify catches what the reference recipe got wrong, and lets pass what is right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from torch import Tensor

from nermill.model_build import cli
from nermill.model_build.artifact import Order, compile_artifact
from nermill.model_build.corpus import Text
from nermill.model_build.verify import Check, report, verify
from nermill.worker.contracts.errors import ArtifactError, EngineError, UsageError
from nermill.worker.engine import load_engine
from nermill.worker.engine.encoder import Encoder, Layer, PlainEncoder
from nermill.worker.engine.warmup import blank_batch
from nermill.worker.tagging.pipeline import load_pipeline

Compiled = Callable[..., Path]
FORWARD, PLAIN_FORWARD = Encoder.forward, PlainEncoder.forward


def swapped(self: PlainEncoder, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
    """The recipe's first fault: the mask arrives as token types and the token types as the mask."""
    return PLAIN_FORWARD(self, input_ids, token_type_ids, attention_mask)


def leaking(self: Encoder, input_ids: Tensor, segments: Tensor, position_ids: Tensor) -> Tensor:
    """Segments that do not keep windows apart."""
    return FORWARD(self, input_ids, segments.clamp(max=1), position_ids)


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize("order", [{"backend": "onnx"}, {"backend": "torch"}, {"backend": "torch", "layout": "plain"}])
def test_right_artifact_passes(bert: Path, compiled: Compiled, order: dict[str, str]) -> None:
    texts = [Text("a train left paris"), Text(("george", "lives", "in", "oslo"), ("B-PER", "O", "O", "B-LOC"))]
    checks = verify(compiled(**order), checkpoint=str(bert), texts=texts, threads=1)
    assert failed(checks) == set()
    assert {check.name: check.value for check in checks}["texts tags"] == 0
    assert ("packing" in {check.name for check in checks}) == (order.get("layout") != "plain")


def test_swapped_inputs_are_caught(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    art = compiled("torch", layout="plain")
    monkeypatch.setattr(PlainEncoder, "forward", swapped)
    assert {"golden logits", "padding"} <= failed(verify(art, threads=1))


def test_fp32_minimum_in_half_precision_is_caught(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    art = compiled("torch", precision="fp16")
    assert failed(verify(art, threads=1)) == set()
    constant = torch.tensor(torch.finfo(torch.float32).min).half()  # -inf, as a compiler that goes to fp16 makes it
    monkeypatch.setattr(Encoder, "masked", constant)
    checks = verify(art, threads=1)
    assert "golden logits" in failed(checks)
    assert "NaN" not in json.dumps(report(art, checks))


def test_leaking_segments_are_caught(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    art = compiled("torch")
    monkeypatch.setattr(Encoder, "forward", leaking)
    assert failed(verify(art, threads=1)) == {"packing"}


def test_texts_need_their_own_checkpoint(
    compiled: Compiled, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="texts need --checkpoint"):
        verify(compiled("torch"), texts=[Text("oslo")])
    other = make_checkpoint("bert", hidden_act="relu", intermediate_size=32)
    with pytest.raises(UsageError, match="was compiled from other weights"):
        verify(compiled("torch"), checkpoint=str(other), texts=[Text("oslo")])


def test_f1_is_compared_on_tagged_texts(bert: Path, compiled: Compiled) -> None:
    texts = [Text(("oslo", "and", "paris"), ("B-LOC", "O", "B-LOC"))] * 3
    checks = {c.name: c for c in verify(compiled("onnx", precision="int8"), checkpoint=str(bert), texts=texts)}
    assert checks["texts F1 lost"].limit == 0.003
    assert checks["texts F1 lost"].note.endswith("on 3 texts")
    assert checks["texts tags"].limit is None


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["nermill-build", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    streams = capsys.readouterr()
    return int(exit_.value.code or 0), streams.out, streams.err


def test_command_line_of_verify(
    compiled: Compiled, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    art = compiled("torch")
    code, out, _ = run(capsys, monkeypatch, "verify", str(art), "--json")
    assert code == 0
    assert json.loads(out)["passed"] is True
    monkeypatch.setattr(Encoder, "forward", leaking)
    code, out, _ = run(capsys, monkeypatch, "verify", str(art))
    assert code == 4
    assert "FAILED" in next(line for line in out.splitlines() if line.startswith("packing"))


def test_command_line_of_bench_inspect_and_shapes(
    compiled: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nermill.model_build.bench.MIN_SECONDS", 0.001)
    for art in (compiled("torch", shapes="2x32,1x80"), compiled("onnx")):
        code, out, _ = run(capsys, monkeypatch, "bench", str(art), "--threads", "1", "--json")
        assert code == 0
        table = json.loads(out)
        assert table["kind"] == "measured"
        assert all(s["tokens_per_second"] > 0 and s["peak_share"] > 0 for s in table["shapes"])
        assert (table["layout"], table["is_free"], table["documents"]) == ("packed", art == compiled("onnx"), 301)
        assert list(table["ways"]) == ["padded", "bucketed", "packed"]
        (tmp_path / "costs.json").write_text(out, "utf-8")
    code, out, _ = run(capsys, monkeypatch, "inspect", str(art), "--json")
    assert (code, json.loads(out)["backend"]) == (0, "onnx")
    (tmp_path / "corpus.txt").write_text("a train left paris\noslo\n", "utf-8")
    arguments = ("--model", str(art), "--costs", str(tmp_path / "costs.json"), "--target", "1000000")
    code, out, _ = run(capsys, monkeypatch, "shapes", str(tmp_path / "corpus.txt"), *arguments, "--json")
    assert code == 0
    body = json.loads(out)
    assert (body["documents"], body["costs"]["kind"]) == (2, "measured")
    assert body["devices"] >= 1
    assert body["ways"]["padded"]["fill"] <= body["ways"]["bucketed"]["fill"] <= 1
    code, out, _ = run(capsys, monkeypatch, "shapes", str(tmp_path / "corpus.txt"), *arguments, "--unit", "word")
    assert code == 2


def test_bench_names_a_shape_that_the_device_refuses(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    from nermill.model_build import bench as module
    from nermill.worker.contracts.errors import EngineError
    from nermill.worker.engine.torch import TorchEngine

    artifact, run_it = compiled("torch", shapes="2x32,1x80"), TorchEngine.run

    def refuse_long(self: TorchEngine, batch: object) -> object:
        if batch.input_ids.shape == (1, 80):  # type: ignore[attr-defined]
            raise EngineError("out of memory")
        return run_it(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(TorchEngine, "run", refuse_long)
    monkeypatch.setattr(module, "MIN_SECONDS", 0.001)
    short, long = module.bench(artifact, threads=1, repeats=1)["shapes"]
    assert short["seconds"] > 0
    assert long == {"rows": 1, "length": 80, "refused": "out of memory"}


def test_loading_says_what_is_missing(compiled: Compiled, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no model artifact"):
        verify(tmp_path)
    art = shutil.copytree(compiled("torch"), tmp_path / "art")
    (art / "golden.json").unlink()
    with pytest.raises(ArtifactError, match=r"golden\.json"):
        verify(art)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("layers", 9, "Missing key"),
        ("heads", 0, "zero"),
        ("hidden", "wide", "tuple of ints"),
        ("activation", "magic", "magic"),
        ("epsilon", "small", "float"),
        ("heads", 3, "multiply up"),
        ("depth", 1, "unexpected keyword"),
    ],
)
def test_weights_that_do_not_fit_their_manifest(
    compiled: Compiled, tmp_path: Path, key: str, value: object, reason: str
) -> None:
    art = shutil.copytree(compiled("torch"), tmp_path / "art")
    body = json.loads((art / "manifest.json").read_text("utf-8"))
    body["details"]["architecture"][key] = value
    (art / "manifest.json").write_text(json.dumps(body), "utf-8")
    with pytest.raises(ArtifactError, match=f"does not load it on cpu .*{reason}.*; build it again"):
        load_pipeline(art)


def test_a_failed_batch_is_not_kept_while_it_is_tried_again(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_engine(compiled("torch"))

    def full(*_: object, **__: object) -> None:
        raise IndexError("no room\nframe #0")

    monkeypatch.setattr(Encoder, "forward", full)
    with pytest.raises(EngineError, match=r"refuses shape 2x16: no room$") as caught:
        engine.run(blank_batch((2, 16), engine.manifest))
    assert caught.value.__cause__ is not None
    assert caught.value.__cause__.__traceback__ is None


def test_int8_of_torch_is_for_cpus(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ArtifactError, match="int8 is for CPUs; for cuda:0 build it with --precision fp16"):
        load_pipeline(compiled("torch", precision="int8"), "cuda:0")


def test_compile_refuses_a_graph_that_does_not_answer_as_the_checkpoint(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Layer, "forward", lambda self, x, bias: x)
    with pytest.raises(EngineError, match="away from the checkpoint's logits"):
        compile_artifact(str(bert), tmp_path / "art", Order("torch"))
    assert list(tmp_path.iterdir()) == []
