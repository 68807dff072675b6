"""``nermill export``: what annotators and other tools read; a corrected CoNLL file is gold."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nermill.producer.entities.export import words_of
from nermill.producer.sources import ReadOptions, open_sources
from tests.texts import Made, make_run
from tests.unit.evaluation.runs import Doc
from tests.unit.evaluation.runs import make_run as run_of_words

NBSP = "a\N{NO-BREAK SPACE}b"
SENTENCES = [
    Doc(["Ada", "Lovelace", "met", "Bob"], ["B-PER", "I-PER", "O", "B-PER"], None),
    Doc(["never", "tagged"], None, None),
    Doc(None, None, None),  # its words are not known: a line that was not UTF-8
    Doc([NBSP, "ACME"], ["O", "B-ORG"], None),
]
TEXTS: list[Made | None] = [
    ("Ada Lovelace, of Rene\u0301's\nACME-Corp!", [(0, 12, "PER"), (17, 22, "PER"), (25, 34, "ORG")]),
    None,
    ("AdaBob no one", [(0, 3, "PER"), (3, 6, "PER")]),
]


def exported(nermill, run: str, form: str, *more: object) -> str:
    code, out, err = nermill("export", run, "--format", form, *more)
    assert (code, err) == (0, "")
    return out


@pytest.mark.parametrize("unit", ["sentence", pytest.param("document", marks=pytest.mark.slow)])
def test_a_corrected_conll_file_evaluates_as_gold(nermill, tmp_path, unit):
    run = run_of_words(tmp_path, SENTENCES, unit=unit)
    gold = tmp_path / "gold.conll"
    exported(nermill, run.uri, "conll", "--to", gold)
    assert evaluated(nermill, run.uri, gold)["f1"] == 1.0
    gold.write_text(gold.read_text("utf-8").replace("Bob B-PER", "Bob B-LOC"), "utf-8")
    scores = evaluated(nermill, run.uri, gold)
    assert scores["documents"] == 4
    assert (scores["precision"], scores["recall"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    gold.write_bytes(b"\xef\xbb\xbf" + gold.read_bytes().replace(b"\n", b"\r\n"))  # saved by an editor on Windows
    assert evaluated(nermill, run.uri, gold)["f1"] == scores["f1"]


def evaluated(nermill, run: str, gold: Path) -> dict:
    code, out, err = nermill("evaluate", run, "--gold", gold, "--json")
    assert code == 0, err
    return json.loads(out)


def test_texts_as_conll_are_an_input_with_gold_tags(nermill, tmp_path):
    run = make_run(tmp_path / "out", TEXTS, keep_text=False)
    path = tmp_path / "texts.conll"
    path.write_text(exported(nermill, run.uri, "conll"), "utf-8")
    options = ReadOptions(unit="document")
    (source,) = open_sources([str(path)], options).sources
    assert source.format == "conll"
    read = [list(zip(d.words or (), d.gold_tags or (), strict=True)) for d in source.documents(options)]
    assert read == [
        [
            ("Ada", "B-PER"), ("Lovelace", "I-PER"), (",", "O"), ("of", "O"), ("Rene\u0301", "B-PER"), ("'", "O"),
            ("s", "O"), ("ACME", "B-ORG"), ("-", "I-ORG"), ("Corp", "I-ORG"), ("!", "O"),
        ],
        [("\N{REPLACEMENT CHARACTER}", "O")],
        [("Ada", "B-PER"), ("Bob", "B-PER"), ("no", "O"), ("one", "O")],
    ]  # fmt: skip


@given(st.text(), st.lists(st.integers(0, 20)))
def test_words_are_what_is_no_space_in_order(text, edges):
    spans = list(words_of(text, edges))
    assert all(start < end for start, end in spans)
    assert [start for start, _ in spans] == sorted({start for start, _ in spans})
    words = [text[start:end] for start, end in spans]
    assert "".join(words) == "".join(letter for letter in text if all(words_of(letter)) and list(words_of(letter)))
    assert not any(start < edge < end for start, end in spans for edge in edges)


def test_jsonl_has_what_doccano_spacy_and_nermill_read(nermill, tmp_path):
    rows = [json.loads(line) for line in exported(nermill, make_run(tmp_path, TEXTS).uri, "jsonl").splitlines()]
    assert [row["id"] for row in rows] == ["d0", "d2"]
    assert rows[1]["label"] == [[0, 3, "PER"], [3, 6, "PER"]]
    assert rows[1]["spans"][1] == {"start": 3, "end": 6, "label": "PER", "score": pytest.approx(0.9)}
    words = exported(nermill, run_of_words(tmp_path, SENTENCES).uri, "jsonl").splitlines()
    assert json.loads(words[0])["tokens"] == SENTENCES[0].words
    assert json.loads(words[0])["ner_tags"] == SENTENCES[0].tags


def test_csv_has_a_row_an_entity(nermill, tmp_path):
    run = make_run(tmp_path, [('say "Ada,\nBob"', [(5, 13, "PER")]), *TEXTS])
    to = tmp_path / "out.csv"
    exported(nermill, run.uri, "csv", "--to", to)
    with to.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 6
    assert rows[0] == {
        "doc_index": "0", "id": "d0", "start": "5", "end": "13", "label": "PER", "text": "Ada,\nBob", "score": "0.9",
    }  # fmt: skip


def test_a_wrong_input_is_one_line_and_writes_nothing(nermill, tmp_path):
    run = make_run(tmp_path / "out", TEXTS).uri
    partial = make_run(tmp_path / "out", TEXTS, run_id="partial", per_shard=2, missing=1).uri
    spaced = run_of_words(tmp_path, [Doc(["New York"], ["B-LOC"], None)]).uri
    there, to = tmp_path / "there", tmp_path / "to"
    there.write_text("mine")
    for arguments, said in (
        ((partial, "--format", "conll", "--to", to), "not complete"),
        ((run, "--format", "xml", "--to", to), "one of conll, jsonl, csv"),
        ((run, "--format", "csv", "--to", there), "exists already"),
        ((run, "--format", "csv", "--json"), "name one with --to"),
        ((spaced, "--format", "conll", "--to", to), "the word 'New York', which CoNLL cannot represent"),
    ):
        code, out, err = nermill("export", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert said in err
    assert (to.exists(), there.read_text()) == (False, "mine")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    run = make_run(tmp_path, TEXTS * 20_000, per_shard=1000).uri
    command = f"{sys.executable} -m nermill.producer.cli export {run} --format jsonl | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr, done.stdout.count(b"\n")) == (0, b"", 1)
