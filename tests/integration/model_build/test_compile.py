"""A checkpoint of every family becomes an artifact that answers as the checkpoint does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import onnx
import onnxruntime

from nermill.model_build.artifact import Order, compile_artifact
from nermill.model_build.checkpoint import open_checkpoint
from nermill.model_build.reference import reference_logits, windows_of
from nermill.model_build.verify import run_packed
from nermill.worker.contracts.errors import ArtifactError, EngineError
from nermill.worker.contracts.manifest import Precision, load_manifest
from nermill.worker.engine import load_engine
from nermill.worker.engine.encoder import MASKED
from nermill.worker.engine.golden import lay_rows, run_alone
from tests.checkpoints import FAMILIES, LABELS, MAX_LENGTH, vocabulary

TEXTS = ["george washington went to washington.", "oslo", "a very long train (of thought) left paris at 10.45"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["onnx", "torch"])
@pytest.mark.slow
def test_every_family_answers_as_its_checkpoint(
    make_checkpoint: Callable[..., Path], tmp_path: Path, family: str, backend: str
) -> None:
    folder = make_checkpoint(family)
    manifest = compile_artifact(str(folder), tmp_path / "art", Order(backend))  # type: ignore[arg-type]
    checkpoint = open_checkpoint(str(folder))
    windows = windows_of(checkpoint, TEXTS, MAX_LENGTH)
    engine = load_engine(tmp_path / "art", "cpu", 1)
    for mine, theirs in zip(run_packed(engine, windows), reference_logits(checkpoint, windows), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
    engine.close()
    assert (manifest.labels, manifest.scheme, manifest.lowercase) == (LABELS, "IOB2", True)
    assert (manifest.cls_id, manifest.pad_id, manifest.sep_id, manifest.max_length) == (0, 1, 2, MAX_LENGTH)
    assert [entry.name for entry in manifest.inputs] == ["input_ids", "segments", "position_ids"]


def test_pickled_weights_read_the_same(make_checkpoint: Callable[..., Path], bert: Path) -> None:
    pickled = open_checkpoint(str(make_checkpoint("bert", pickled=True))).weights()
    for name, tensor in open_checkpoint(str(bert)).weights().items():
        assert (pickled[name] == tensor).all(), name


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "fused"), [("gelu", "BiasGelu"), ("gelu_new", "FastGelu")])
def test_activations_are_fused(
    make_checkpoint: Callable[..., Path], tmp_path: Path, activation: str, fused: str
) -> None:
    compile_artifact(str(make_checkpoint("bert", hidden_act=activation)), tmp_path / "art", Order("onnx"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "art" / "model.onnx"), options)
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert fused in kinds
    assert not {"Erf", "Tanh"} & set(kinds)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("onnx", "int64"), pytest.param("onnx", "int32", marks=pytest.mark.slow), ("torch", "int64"), ("torch", "int32")],
)
def test_plain_layout_is_the_recipes_contract(
    bert: Path, compiled: Callable[..., Path], backend: str, dtype: str
) -> None:
    engine = load_engine(compiled(backend, layout="plain", index_dtype=dtype), "cpu", 1)
    manifest = engine.manifest
    assert [(e.name, e.dtype) for e in manifest.inputs] == [
        (name, dtype) for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    checkpoint = open_checkpoint(str(bert))
    windows = windows_of(checkpoint, TEXTS, MAX_LENGTH)
    padded = engine.run(lay_rows([[ids] for ids in windows], (3, MAX_LENGTH), manifest))
    for row, theirs in zip(padded, reference_logits(checkpoint, windows), strict=True):
        np.testing.assert_allclose(row[: len(theirs)], theirs, atol=1e-4)
    engine.close()


def test_fixed_shapes_refuse_another(compiled: Callable[..., Path]) -> None:
    engine = load_engine(compiled("torch", shapes="2x32,1x80"), "cpu", 1)
    manifest = engine.manifest
    assert manifest.shapes == ((2, 32), (1, 80))
    assert manifest.max_length == 80
    assert engine.run(lay_rows([], (2, 32), manifest)).shape == (2, 32, len(LABELS))
    with pytest.raises(EngineError, match=r"2x33 was not compiled; .* takes 2x32, 1x80"):
        engine.run(lay_rows([], (2, 33), manifest))
    engine.close()


@pytest.mark.parametrize(("backend", "precision"), [("torch", "bf16"), ("torch", "fp16"), ("torch", "int8")])
def test_low_precision_stays_within_its_tolerance(compiled: Callable[..., Path], backend: str, precision: str) -> None:
    manifest = load_manifest(compiled(backend, precision=precision))  # not built where golden logits are beyond it
    assert manifest.precision == precision
    assert 1e-4 < manifest.tolerance < 10


@pytest.mark.parametrize("backend", [pytest.param("onnx", marks=pytest.mark.slow), "torch"])
def test_int8_owes_nothing_to_neighbours(bert: Path, compiled: Callable[..., Path], backend: str) -> None:
    """One loud window must not make its neighbours' numbers coarser, as one scale for a whole tensor does."""
    engine = load_engine(compiled(backend, precision="int8", layout="packed"), "cpu", 1)
    windows = windows_of(open_checkpoint(str(bert)), TEXTS, MAX_LENGTH)
    for alone, among in zip(run_alone(engine, windows), run_packed(engine, windows), strict=True):
        assert np.abs(alone - among).max() < 1e-4
    engine.close()


def test_mask_constant_is_finite_in_half_precision_and_set_by_us(compiled: Callable[..., Path]) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(compiled("onnx") / "model.onnx").graph
    scalars = [onnx.numpy_helper.to_array(t) for t in graph.initializer]
    smallest = min(float(value.min()) for value in scalars if value.dtype == np.float32)
    assert smallest == MASKED
    assert np.isfinite(np.float16(MASKED))


def test_parameters_keep_their_names(compiled: Callable[..., Path]) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(compiled("onnx") / "model.onnx").graph
    names = {tensor.name for tensor in graph.initializer}
    assert {"words.weight", "layers.1.qkv.weight", "layers.0.narrow_norm.bias", "classifier.bias"} <= names
    assert str(Path(__file__).parents[3]).encode() not in (compiled("onnx") / "model.onnx").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "files"), [("fp32", {"model.onnx", "model.onnx.data"}), ("int8", {"model.onnx"})]
)
def test_large_weights_lie_beside_the_graph(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision, files: set[str]
) -> None:
    monkeypatch.setattr("nermill.model_build.export.INLINE_BYTES", 0)
    manifest = compile_artifact(str(bert), tmp_path / "art", Order("onnx", precision=precision))
    assert manifest.files.keys() == files | {"golden.json", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "art").iterdir()} == manifest.files.keys() | {"manifest.json"}


def test_tokenizer_comes_without_truncation(compiled: Callable[..., Path]) -> None:
    tokenizer = json.loads((compiled("torch") / "tokenizer.json").read_text("utf-8"))
    assert (tokenizer["truncation"], tokenizer["padding"]) == (None, None)


def test_vocabulary_without_a_fast_tokenizer_is_converted(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("bert")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "model_max_length": 48}', "utf-8")
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.lowercase, checkpoint.max_length) == (False, 48)
    assert (checkpoint.cls_id, checkpoint.sep_id) == (0, 2)


def test_hub_name_is_found_in_the_cache(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    source, revision = make_checkpoint("bert"), "95c62bc0d4109bd97d0578e5ff482e6b84c2b8b9"
    repository = tmp_path / "models--owner--tiny-ner"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        blob = repository / "blobs" / str(number)
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    by_name = open_checkpoint(f"owner/tiny-ner@{revision}")
    assert (by_name.name, by_name.source["revision"]) == ("owner/tiny-ner", revision)
    assert by_name.source == open_checkpoint(str(snapshot)).source
    assert len(by_name.weights()) > 10


def test_rare_settings_of_a_checkpoint_are_kept(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint("bert", hidden_act="gelu_new", layer_norm_eps=0.1, type_vocab_size=3)
    compile_artifact(str(folder), tmp_path / "art", Order("torch"))  # raises where golden logits differ


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [
        (("O", "B-A", "I-A"), "IOB2"),
        (("O", "I-A", "I-B"), "IOB1"),
        (("O", "B-A", "I-A", "E-A", "S-A"), "BIOES"),
        (("O", "A", "B"), "IO"),
    ],
)
def test_scheme_is_read_from_the_labels(labels: tuple[str, ...], scheme: str) -> None:
    from nermill.model_build.checkpoint import tag_scheme

    assert tag_scheme(labels) == scheme


def test_changed_byte_foreign_version_and_missing_file_are_named(compiled: Callable[..., Path], tmp_path: Path) -> None:
    art = shutil.copytree(compiled("torch"), tmp_path / "art")
    original = (art / "tokenizer.json").read_bytes()
    (art / "tokenizer.json").write_bytes(original[:-1] + b" ")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: changed since it was built"):
        load_engine(art)
    (art / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: No such file"):
        load_engine(art)
    (art / "tokenizer.json").write_bytes(original)
    rewrite_manifest(art, schema_version=99)
    with pytest.raises(ArtifactError, match="schema version 99"):
        load_manifest(art)


def rewrite_manifest(art: Path, **changes: object) -> None:
    path = art / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def test_inputs_in_another_order_are_refused(compiled: Callable[..., Path], tmp_path: Path) -> None:
    art = shutil.copytree(compiled("onnx", layout="plain"), tmp_path / "art")
    swapped = ("input_ids", "token_type_ids", "attention_mask")
    rewrite_manifest(art, inputs=[{"name": name, "dtype": "int64"} for name in swapped])
    with pytest.raises(ArtifactError, match="the graph takes input_ids, attention_mask, token_type_ids and the man"):
        load_engine(art)


def test_device_that_is_not_there(compiled: Callable[..., Path]) -> None:
    for backend, message in (("onnx", "no CUDAExecutionProvider; pip install onnxruntime-gpu"), ("torch", "0 CUDA")):
        art = compiled(backend)
        with pytest.raises(ArtifactError, match=message):
            load_engine(art, "cuda:0")
        with pytest.raises(ArtifactError, match="write cpu, cuda:N or npu:N"):
            load_engine(art, "tpu:0")
