"""A wrong input gets one line that says what and where, exit code 2, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from nermill.model_build import cli
from tests.checkpoints import rewrite_config

Checkpoint = Callable[..., Path]


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs ``compile`` on a checkpoint that must be refused; returns the one line."""

    def run(checkpoint: Path | str, *options: str) -> str:
        out = tmp_path / "made" / "art"
        arguments = ["compile", str(checkpoint), "--out", str(out), "--backend", "torch", *options]
        monkeypatch.setattr("sys.argv", ["nermill-build", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        streams = capsys.readouterr()
        assert exit_.value.code == 2
        assert streams.out == ""
        assert not out.parent.exists() or list(out.parent.iterdir()) == []
        (line,) = streams.err.splitlines()
        return line.removeprefix("nermill-build: ")

    return run


def test_folder_that_is_no_checkpoint(refusal: Callable[..., str], tmp_path: Path) -> None:
    assert refusal(tmp_path / "nothing") == f"{tmp_path / 'nothing'}: no such folder"
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").endswith("no checkpoint (config.json is missing)")


def test_hub_name_without_a_revision(refusal: Callable[..., str]) -> None:
    assert "a hub name needs its revision: dslim/bert-large-NER@REVISION" in refusal("dslim/bert-large-NER")


def test_hub_that_does_not_answer(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal("dslim/bert-large-NER@95c62bc").startswith("dslim/bert-large-NER@95c62bc: the hub did not give it")


def test_sequence_classifier(refusal: Callable[..., str], make_checkpoint: Checkpoint) -> None:
    folder = make_checkpoint("bert", task="SequenceClassification")
    assert refusal(folder).endswith("BertForSequenceClassification is no token classifier; nermill needs one")


def test_family_that_is_not_served(refusal: Callable[..., str], make_checkpoint: Checkpoint) -> None:
    folder = make_checkpoint("bert")
    rewrite_config(folder, model_type="deberta-v2")
    assert "model type 'deberta-v2' cannot be served; nermill takes bert, roberta" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' cannot be served"),
        ({"hidden_act": "mish"}, "activation 'mish' cannot be served; nermill takes gelu"),
        ({"is_decoder": True}, "a decoder (is_decoder) cannot be served"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"id2label": {"0": "PER", "1": "LOC"}}, "none is 'O'"),
        ({"id2label": {"0": "O", "2": "B-PER"}}, "id2label does not name the labels 0, 1"),
        ({"id2label": {"0": "O", "1": "B-PER"}}, "the classifier has 5 outputs and config.json 2 labels"),
        ({"vocab_size": 20}, "tokens and the model 20"),
    ],
)
def test_configuration_that_does_not_fit(
    refusal: Callable[..., str], make_checkpoint: Checkpoint, changes: dict[str, object], message: str
) -> None:
    folder = make_checkpoint("bert")
    rewrite_config(folder, **changes)
    assert message in refusal(folder)


def test_sentencepiece_model_without_a_fast_tokenizer(refusal: Callable[..., str], make_checkpoint: Checkpoint) -> None:
    folder = make_checkpoint("roberta")
    (folder / "tokenizer.json").unlink()
    (folder / "sentencepiece.bpe.model").write_bytes(b"\n\x0e\n\x05<unk>")
    assert "no fast tokenizer (sentencepiece.bpe.model)" in refusal(folder)


@pytest.mark.parametrize("pickled", [False, True])
def test_truncated_weights(refusal: Callable[..., str], make_checkpoint: Checkpoint, pickled: bool) -> None:
    folder = make_checkpoint("bert", pickled=pickled)
    name = "pytorch_model.bin" if pickled else "model.safetensors"
    (folder / name).write_bytes((folder / name).read_bytes()[:-5000])
    assert name in refusal(folder)


def test_pickle_that_runs_code_is_not_run(
    refusal: Callable[..., str], make_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    import torch

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "owned"),))  # type: ignore[return-value]

    folder = make_checkpoint("bert", pickled=True)
    torch.save({"bert.embeddings.word_embeddings.weight": Payload()}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(folder)
    assert not (tmp_path / "owned").exists()


def test_weights_that_are_missing(refusal: Callable[..., str], make_checkpoint: Checkpoint) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint("bert")
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "weight bert.encoder.layer.1.output.dense.bias is missing" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "no weights (model.safetensors or pytorch_model.bin)" in refusal(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shapes", "32"), "--shapes '32': write auto, or rows x length"),
        (("--shapes", "0x64"), "--shapes '0x64': write auto"),
        (("--shapes", "2x64,2x64"), "a shape is there twice"),
        (("--shapes", "2x128"), "--shapes 2x128: the model reads at most 96 tokens"),
        (("--precision", "int4"), "--precision int4: backend torch takes fp32, fp16, bf16, int8"),
        (("--backend", "tensorrt"), "--backend tensorrt: nermill builds onnx, torch, openvino, aie, om"),
        (("--layout", "ragged"), "--layout ragged: nermill builds packed, plain"),
        (("--index-dtype", "int8"), "--index-dtype int8: nermill builds int64, int32"),
        (("--shape", "2x64"), "No such option: --shape"),
    ],
)
def test_options_that_do_not_fit(
    refusal: Callable[..., str], bert: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in refusal(bert, *options)


def test_output_folder_that_exists(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("precious", "utf-8")
    arguments = ["compile", str(bert), "--out", str(tmp_path / "mine"), "--backend", "torch"]
    monkeypatch.setattr("sys.argv", ["nermill-build", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert "is there already; name a new folder or remove it" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text("utf-8") == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "{}/none"), "no model artifact"),
        (("bench", "{}/none"), "no model artifact"),
        (("inspect", "{}/none"), "no model artifact"),
        (("shapes", "{}/none.txt"), "none.txt: cannot be read"),
        (
            ("shapes", "{}/texts.txt", "--costs", "910b"),
            "cannot be read (No such file or directory); tables by name are 310p3-bert-base, 310p3-bert-large",
        ),
        (("shapes", "{}/broken.jsonl"), "broken.jsonl:2: no JSON object with a text"),
        (("bench", "demo", "--device", "cuda:7"), "minilm-ner-en: its int8 graph runs on a CPU; for cuda:7 comp"),
    ],
)
def test_other_commands(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    (tmp_path / "texts.txt").write_text("oslo\n", "utf-8")
    (tmp_path / "broken.jsonl").write_text('{"text": "oslo"}\n{"txt": 1}\n', "utf-8")
    monkeypatch.setattr("sys.argv", ["nermill-build", *(argument.format(tmp_path) for argument in arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2
    assert message in line
