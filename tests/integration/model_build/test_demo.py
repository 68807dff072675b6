"""The bundled demo model: small enough to ship, right about names, and a checkpoint again when it is asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import MPNetConfig, MPNetForTokenClassification

from nermill.model_build.artifact import Order, compile_artifact
from nermill.model_build.checkpoint import open_checkpoint
from nermill.model_build.demo.casing import MARKS, with_case_marks
from nermill.model_build.demo.corpora import LABELS, bits, read_plain, with_targets
from nermill.model_build.demo.encoders import load_encoder, logits_of
from nermill.model_build.demo.recover import recover
from nermill.model_build.demo.train import distilled_loss, encode, going_on
from nermill.model_build.verify import verify
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.manifest import TOKENIZER_FILE, load_manifest, resolve_artifact
from nermill.worker.engine import load_engine
from nermill.worker.engine.golden import load_golden, run_alone

MARKED = [f"##{mark}" for mark in MARKS.values()]


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovered") / "demo"
    recover(folder)
    return folder


def test_artifact_is_what_the_card_says() -> None:
    folder = resolve_artifact("demo")
    manifest = load_manifest(folder)
    assert (manifest.backend, manifest.precision, manifest.layout) == ("onnx", "int8", "equal")
    assert (manifest.shapes, manifest.max_length, manifest.scheme) == ((), 512, "IOB2")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 25e6
    assert all(check.passed for check in verify(folder, threads=1))


def test_recovered_checkpoint_answers_as_the_artifact(recovered: Path, tmp_path: Path) -> None:
    manifest = compile_artifact(str(recovered), tmp_path / "fp32", Order("torch"))
    bundled = load_manifest(resolve_artifact("demo"))
    assert (manifest.labels, manifest.cls_id, manifest.sep_id) == (bundled.labels, bundled.cls_id, bundled.sep_id)
    golden = load_golden(resolve_artifact("demo"))
    engine = load_engine(tmp_path / "fp32", "cpu", 1)
    answers = run_alone(engine, golden.windows)
    engine.close()
    different = sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in zip(answers, golden.logits, strict=True))
    assert different / sum(map(len, answers)) <= 0.01
    assert max(float(np.abs(a - b).max()) for a, b in zip(answers, golden.logits, strict=True)) <= bundled.tolerance


@pytest.mark.slow
def test_quantizing_the_recovered_weights_again_moves_them_by_half_a_step_at_most(
    recovered: Path, tmp_path: Path
) -> None:
    from nermill.model_build.int8 import WEIGHT_RANGE, read_weights

    compile_artifact(str(recovered), tmp_path / "int8", Order("onnx", precision="int8"))
    again = read_weights(tmp_path / "int8" / "model.onnx")
    for name, weight in read_weights(resolve_artifact("demo") / "model.onnx").items():
        is_linear = weight.ndim == 2 and not name.startswith(("words.", "positions."))
        step = np.abs(weight).max(0) / WEIGHT_RANGE if is_linear else np.zeros_like(weight)
        assert (np.abs(again[name] - weight) <= 0.51 * step + 1e-6).all(), name


def bundled_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(resolve_artifact("demo") / TOKENIZER_FILE))


def test_case_marks_are_pieces_behind_the_pieces_of_a_word_with_a_capital_letter() -> None:
    state = json.loads(bundled_tokenizer().to_str())
    state["normalizer"] = state["normalizer"]["normalizers"][-1]
    state["model"]["vocab"] = {token: n for token, n in state["model"]["vocab"].items() if token not in MARKED}
    plain = Tokenizer.from_str(json.dumps(state))
    marked, kinds = with_case_marks(plain)
    assert sorted(kinds) == [plain.get_vocab_size(), plain.get_vocab_size() + 1]
    assert marked.get_vocab() == bundled_tokenizer().get_vocab()
    assert with_case_marks(bundled_tokenizer())[1] == {}
    for word, mark in {"Grateful": "##⇧", "Zürich": "##⇧", "NATO": "##⇪", "B52": "##⇧", "The": "", "of": ""}.items():
        text = f"a {word}, b"
        before, after = (t.encode(text, add_special_tokens=False) for t in (plain, marked))
        where = [place for place, token in enumerate(after.tokens) if token.startswith(tuple(MARKED))]
        assert [after.tokens[place] for place in where] == ([mark] if mark else [])
        for values in ("tokens", "word_ids", "offsets"):
            left = [value for place, value in enumerate(getattr(after, values)) if place not in where]
            assert left == getattr(before, values)


def test_later_pieces_of_a_word_go_on_with_its_labels() -> None:
    sentence = with_targets(["Wolf-Rüdiger", "slept"], ["B-PER", "O"], {"PER": ("PER",)}, [bits("O")] * 2)
    _, first = encode(bundled_tokenizer(), [sentence])
    _, pieces = encode(bundled_tokenizer(), [sentence], pieces=True)
    assert [labels for labels in first.tolist() if labels] == [bits("B-PER"), bits("O")]
    told = [labels for labels in pieces.tolist() if labels]
    assert told == [bits("B-PER"), *[bits("I-PER")] * (len(told) - 2), bits("O")]
    assert len(told) > 2
    assert going_on(bits("O", "B-MISC", "I-MISC")) == bits("O", "I-MISC")


def test_sentences_without_labels_have_every_label_and_none_of_the_evaluation_corpus(tmp_path: Path) -> None:
    known = "one two three four five six seven eight"
    (tmp_path / "plain.tsv").write_text(f"`` Ada '' slept .\tAda slept .\n\n{known} nine\n", "utf-8")
    corpus, left_out = read_plain([tmp_path / "plain.tsv"], {tuple(known.split())})
    assert ([d[0].words for d in corpus.train], left_out) == ([['"', "Ada", '"', "slept", "."]], 1)
    assert {labels for d in corpus.train for labels in d[0].allowed} == {bits(*LABELS)}
    assert corpus.held == []


def test_mpnet_reads_the_ids_of_bert_s_tokenizer(tmp_path: Path) -> None:
    words = ["[UNK]", "ada", "slept"]
    own = {word: number for number, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words, "<mask>"])}
    model = MPNetForTokenClassification(
        MPNetConfig(
            vocab_size=len(own), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    ).eval()
    model.save_pretrained(tmp_path)
    Tokenizer(WordLevel(own, "[UNK]")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(
        WordLevel({word: number for number, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[MASK]", *words])}, "[UNK]")
    )
    ids = torch.tensor([[own["<s>"], own["ada"], own["slept"], own["</s>"]]])
    wanted = model(input_ids=ids).logits
    loaded = load_encoder(tmp_path, tokenizer).eval()
    found = logits_of(loaded, torch.tensor([[1, 5, 6, 2, 0]]), torch.tensor([[1, 1, 1, 1, 0]]))
    torch.testing.assert_close(found[:, :4], wanted)
    with pytest.raises(SystemExit, match="the vocabulary lacks 'babbage'"):
        load_encoder(tmp_path, Tokenizer(WordLevel({"babbage": 0}, "babbage")))


def test_a_model_that_has_learned_its_teacher_s_labels_has_no_loss() -> None:
    torch.manual_seed(0)
    taught = torch.randn(1, 3, len(LABELS))
    targets = torch.tensor([[0, bits("O"), bits("O", "B-PER")]])
    assert float(distilled_loss(taught + 3, taught, targets)) == pytest.approx(0, abs=1e-6)
    other = taught.clone()
    other[:, 0] += torch.randn(len(LABELS))  # a token without a target
    assert float(distilled_loss(other, taught, targets)) == pytest.approx(0, abs=1e-6)
    other[:, 1, 0] += 9
    assert float(distilled_loss(other, taught, targets)) > 1


def test_recovering_needs_a_new_folder(recovered: Path) -> None:
    with pytest.raises(UsageError, match="is there already"):
        recover(recovered)
    assert open_checkpoint(str(recovered)).lowercase
