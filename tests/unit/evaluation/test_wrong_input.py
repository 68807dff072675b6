"""Runs and gold files that cannot be evaluated: each gives one line that says what is wrong and where."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.layout import RunFolder, part_name
from nermill.worker.contracts.manifest import TOKENIZER_FILE, GraphInput, Manifest, file_sha256, load_manifest
from nermill.worker.contracts.schema import SCHEMA_VERSION
from nermill.worker.evaluation import below_thresholds, evaluate
from tests.unit.evaluation.runs import Doc, make_run, write_part

WORDS = ["Anna", "flew", "to", "Rome"]
TAGS = ["B-PER", "O", "O", "B-LOC"]
GOLD = "Anna B-PER\nflew O\nto O\nRome B-LOC\n\n"


def line_of(run: RunFolder, **options) -> str:
    """The message of the error, which has one line."""
    with pytest.raises(UsageError) as error:
        evaluate(run, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path, [Doc(WORDS, TAGS, None)] * 4, per_shard=2)


def gold_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "gold.conll"
    path.write_text(text, "utf-8")
    return path


def test_no_run(tmp_path: Path) -> None:
    assert "no run here" in line_of(RunFolder(str(tmp_path)))


def test_a_run_that_is_not_complete(run: RunFolder) -> None:
    run.remove(part_name(1))
    line = line_of(run)
    assert "1 of 2 shards (2 of 4 documents) have no part" in line
    assert "--partial" in line
    report = evaluate(run, partial=True)
    assert report["documents"] == 2
    assert report["warnings"][0].startswith("partial: 1 of 2 shards")


def test_a_run_without_any_part(run: RunFolder) -> None:
    for shard in (0, 1):
        run.remove(part_name(shard))
    assert "it has no part yet" in line_of(run, partial=True)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[::-1]])
def test_a_damaged_part(run: RunFolder, damage) -> None:
    run.write(part_name(1), damage(run.read(part_name(1))))
    line = line_of(run)
    assert run.path(part_name(1)) in line
    assert "damaged part" in line


def test_a_part_of_something_else(run: RunFolder) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"doc_index": [1]}), sink)
    run.write(part_name(0), sink.getvalue().to_pybytes())
    assert "part schema version None" in line_of(run)
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"doc_index": [1]}).replace_schema_metadata({"nermill.schema_version": SCHEMA_VERSION}), sink
    )
    run.write(part_name(0), sink.getvalue().to_pybytes())
    assert "no column doc_id, entities" in line_of(run)


def test_measurements_of_something_else(run: RunFolder) -> None:
    write_part(run, 0, 0, [Doc(WORDS, TAGS, None)] * 2, stats={"documents": 2})
    assert "measurements without claimed and finished" in line_of(run)


def test_damage_within_a_part(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, [Doc([f"{n}{m}" for m in range(9)], ["O"] * 9, ["O"] * 9) for n in range(500)], per_shard=500
    )
    data = bytearray(run.read(part_name(0)))
    data[100:3000] = bytes(2900)
    run.write(part_name(0), bytes(data))
    assert "damaged part" in line_of(run)


def test_a_gold_file_scores_a_run_that_came_without(run: RunFolder, tmp_path: Path) -> None:
    report = evaluate(run, gold=gold_file(tmp_path, "-DOCSTART- O\n\n" + GOLD * 4))
    assert (report["f1"], report["gold_scheme"], report["scored_documents"]) == (1.0, "IOB2", 4)


def test_a_packed_gold_file(run: RunFolder, tmp_path: Path) -> None:
    text = (GOLD * 4).rstrip().encode()
    for name, data in (("gold.conll.gz", gzip.compress(text)), ("gold.conll.zst", zstandard.compress(text))):
        path = tmp_path / name
        path.write_bytes(data)
        assert evaluate(run, gold=path)["f1"] == 1.0


@pytest.mark.parametrize(
    ("gold", "scheme"),
    [
        ("Anna I-PER\nRome I-LOC\nBonn B-LOC\n", "IOB1"),
        ("Anna S-PER\nRome S-LOC\nBonn S-LOC\n", "BIOES"),
        ("Anna B-PER\nRome B-LOC\nBonn B-LOC\n", "IOB2"),
    ],
)
def test_gold_of_any_scheme_gives_equal_strict_scores(tmp_path: Path, gold: str, scheme: str) -> None:
    """IOB1 gold that is read as IOB2 gives a strict F1 of 0 on equal entities."""
    run = make_run(tmp_path, [Doc(["Anna", "Rome", "Bonn"], ["B-PER", "B-LOC", "B-LOC"], None)])
    report = evaluate(run, gold=gold_file(tmp_path, gold))
    assert report["gold_scheme"] == scheme
    assert (report["f1"], report["strict"]["f1"], report["accuracy"]) == (1.0, 1.0, 1.0)


def test_iob1_in_the_parts_is_normalised_too(tmp_path: Path) -> None:
    report = evaluate(make_run(tmp_path, [Doc(["Anna", "Rome"], ["B-PER", "B-LOC"], ["I-PER", "I-LOC"])]))
    assert (report["strict"]["f1"], report["accuracy"]) == (1.0, 1.0)


def test_predictions_are_not_mended(tmp_path: Path) -> None:
    report = evaluate(make_run(tmp_path, [Doc(["Anna", "Rome"], ["I-PER", "B-LOC"], ["B-PER", "B-LOC"])]))
    assert (report["f1"], report["strict"]["recall"], report["accuracy"]) == (1.0, 0.5, 0.5)


def test_gold_by_document(tmp_path: Path) -> None:
    """IOB1 chunks end with their sentence, also where sentences are joined into a document."""
    run = make_run(
        tmp_path, [Doc(["Anna", "Bob"], ["B-PER", "B-PER"], None), Doc(["Rome"], ["B-LOC"], None)], unit="document"
    )
    gold = "-DOCSTART- O\n\nAnna I-PER\n\nBob I-PER\n\n-DOCSTART- O\n\nRome I-LOC\n"
    report = evaluate(run, gold=gold_file(tmp_path, gold))
    assert (report["f1"], report["support"], report["unit"]) == (1.0, 3, "document")


@pytest.mark.parametrize(
    ("gold", "says"),
    [
        (GOLD * 3, "gold ends after 3 documents, the run has 'doc:3' as number 4"),
        (GOLD * 5, ":21: gold has more than the run's 4 documents"),
        (GOLD * 2 + GOLD.replace("to O\n", "") + GOLD, ":11: 3 gold tags for the 4 words of document 'doc:2'"),
        (GOLD * 3 + GOLD.replace("to", "from"), ":18: the word 'from' stands where document 'doc:3' has 'to'"),
        (GOLD * 3 + GOLD.replace("B-PER", "PER"), ":16: the tag 'PER' is of no known scheme"),
        (GOLD.replace("flew O", "flew"), ":2: 1 column where the file has 2"),
        ("", "gold ends after 0 documents"),
    ],
)
def test_gold_that_does_not_fit(run: RunFolder, tmp_path: Path, gold: str, says: str) -> None:
    line = line_of(run, gold=gold_file(tmp_path, gold))
    assert says in line
    assert "gold.conll" in line


def test_gold_that_cannot_be_read(run: RunFolder, tmp_path: Path) -> None:
    assert "No such file" in line_of(run, gold=tmp_path / "nowhere.conll")
    assert "Is a directory" in line_of(run, gold=tmp_path)
    latin = tmp_path / "latin.conll"
    latin.write_bytes("Łódź B-LOC\n".encode("iso-8859-2"))
    assert "not UTF-8" in line_of(run, gold=latin)
    half = tmp_path / "half.gz"
    half.write_bytes(gzip.compress(GOLD.encode() * 1000)[:60])
    assert "half.gz: compressed data damaged or cut short" in line_of(run, gold=half)
    assert "words without tags" in line_of(run, gold=gold_file(tmp_path, "Anna\nflew\n"))


def test_gold_is_read_as_inputs_are(tmp_path: Path) -> None:
    """Tokens with a no-break space, comments, word numbers; a sentence that the reader rejected has no gold."""
    words = ["10\u00a0000", "flew", "to", "New Rome"]
    docs = [Doc(words, TAGS, None), Doc(None, None, None), Doc(["Bonn"], ["B-LOC"], None)]
    run = make_run(tmp_path, docs)
    sentence = "".join(f"{n}\t{word}\t{tag}\t-\n" for n, (word, tag) in enumerate(zip(words, TAGS, strict=True), 1))
    gold = f"# sent_id = 1\n{sentence}\n# text = x\n1\t\tB-PER\t-\n\n1\tBonn\tB-LOC\t-\n"
    report = evaluate(run, gold=gold_file(tmp_path, gold))
    assert (report["f1"], report["support"], report["scored_documents"]) == (1.0, 3, 2)


def test_gold_for_documents_that_came_as_text(tmp_path: Path) -> None:
    run = make_run(tmp_path, [Doc(None, [], None)])
    assert "came as text, not as words" in line_of(run, gold=gold_file(tmp_path, GOLD))


def test_gold_in_the_run_of_another_length(tmp_path: Path) -> None:
    run = make_run(tmp_path, [Doc(WORDS, TAGS, TAGS), Doc(WORDS, TAGS, TAGS[:3])])
    assert "document 'doc:1' has 3 gold tags for 4 words" in line_of(run)


def test_a_tag_of_no_scheme_in_a_part(tmp_path: Path) -> None:
    run = make_run(tmp_path, [Doc(["a"], ["O"], ["X-PER"])])
    line = line_of(run)
    assert "tag 'X-PER' fits no scheme" in line
    assert "part-00000.parquet" in line


def test_a_gold_file_for_a_partial_run_skips_what_is_missing(tmp_path: Path) -> None:
    docs = [Doc([f"w{n}"], ["B-PER"], None) for n in range(6)]
    run = make_run(tmp_path, docs, per_shard=2)
    run.remove(part_name(1))
    gold = "".join(f"w{n} B-PER\n\n" for n in range(6))
    report = evaluate(run, gold=gold_file(tmp_path, gold), partial=True)
    assert (report["scored_documents"], report["f1"]) == (4, 1.0)


def artifact_that_knows_people(folder: Path) -> Manifest:
    """An artifact whose only label is PER, with compiled shapes and without a model."""
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"no graph")
    (folder / TOKENIZER_FILE).write_bytes(b"{}")
    Manifest(
        name="people",
        backend="onnx",
        model_file="model.onnx",
        layout="packed",
        precision="fp32",
        inputs=(GraphInput("input_ids", "int64"),),
        shapes=((8, 64), (4, 128)),
        token_budget=512,
        max_length=128,
        labels=("O", "B-PER", "I-PER"),
        scheme="IOB2",
        lowercase=False,
        cls_id=1,
        sep_id=2,
        pad_id=0,
        source={"name": "made by hand"},
        libraries={},
        files={name: file_sha256(folder / name) for name in ("model.onnx", TOKENIZER_FILE)},
        tolerance=0.0,
    ).write(folder)
    return load_manifest(folder)


def test_labels_that_the_model_does_not_know(tmp_path: Path) -> None:
    manifest = artifact_that_knows_people(tmp_path / "people")
    docs = [Doc(WORDS, TAGS, ["B-PER", "O", "O", "B-GPE"])] * 3
    run = make_run(tmp_path, docs, model=str(tmp_path / "people"), artifact=manifest.sha256)
    report = evaluate(run)
    (line,) = report["warnings"]
    assert "gold has labels that the model does not have: GPE (3); it has PER" in line
    line = line_of(run, gold=gold_file(tmp_path, GOLD.replace("B-LOC", "B-GPE") * 3))
    assert "gold.conll: gold has labels that the model does not have: GPE (3)" in line
    assert report["lengths"]["shapes"] == [[8, 64], [4, 128]]
    assert report["origin"]["artifact"]["name"] == "people"


def test_a_changed_artifact_is_not_quoted(tmp_path: Path) -> None:
    artifact_that_knows_people(tmp_path / "people")
    report = evaluate(make_run(tmp_path, [Doc(WORDS, TAGS, TAGS)], model=str(tmp_path / "people")))
    assert report["origin"]["artifact"] is None
    assert report["warnings"] == []


def test_thresholds(tmp_path: Path) -> None:
    report = evaluate(make_run(tmp_path, [Doc(WORDS, ["B-PER", "O", "O", "O"], TAGS)] * 10))
    assert below_thresholds(report, f1=0.6, accuracy=0.7, documents_per_second=9.0) == []
    lines = below_thresholds(report, f1=0.7, accuracy=0.8, documents_per_second=11.0)
    assert [line.split(" is below")[0] for line in lines] == [
        "f1 0.666667",
        "accuracy 0.75",
        "documents per second 10",
    ]


def test_a_threshold_without_gold(run: RunFolder) -> None:
    report = evaluate(run)
    assert below_thresholds(report, documents_per_second=0.1) == []
    with pytest.raises(UsageError, match="no gold tags"):
        below_thresholds(report, f1=0.5)
