"""``nermill redact`` and ``nermill restore``: whole files or none, private keys, texts that return."""

from __future__ import annotations

import csv
import json
import os
import stat
from pathlib import Path

import pytest
from pyarrow import parquet as pq

from nermill.worker.contracts.layout import part_name
from tests.texts import Made, make_run

DOCUMENTS: list[Made | None] = [
    ("Ada met Bob in London", [(0, 3, "PER"), (8, 11, "PER"), (15, 21, "LOC", 0.4)]),
    None,
    ("no one,\r\n\"or\" 'two'", []),
    ("Bob met Rene\u0301 \u05d0\u05d1\u05d2", [(0, 3, "PER"), (8, 13, "PER"), (14, 17, "PER")]),
]
TEXTS = [made and made[0] for made in DOCUMENTS]
SUFFIXES = ("jsonl", "parquet", "csv")


@pytest.fixture
def run(tmp_path) -> str:
    return make_run(tmp_path / "out", DOCUMENTS, per_shard=3).uri


def rows_of(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    entities = [json.loads(row["entities"]) if "entities" in row else [] for row in rows]
    return [
        {**row, "entities": found, "text": row["text"] if row["status"] == "ok" else None}
        for row, found in zip(rows, entities, strict=True)
    ]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("keep_text", [True, False])
def test_labels_stand_in_every_format(nermill, tmp_path, suffix, keep_text):
    run = make_run(tmp_path / "out", DOCUMENTS, per_shard=3, keep_text=keep_text)
    to = tmp_path / f"to.{suffix}"
    code, out, err = nermill("redact", run.uri, "--to", to, "--json")
    body = json.loads(out)
    assert (code, body["documents"], body["left_out"], body["entities"]) == (0, 4, 1, {"LOC": 1, "PER": 5})
    assert "1 rejected documents are left out" in err
    rows = rows_of(to)
    assert [row["text"] for row in rows] == ["[PER] met [PER] in [LOC]", None, TEXTS[2], "[PER] met [PER] [PER]"]
    assert [row["id"] for row in rows] == ["d0", "d1", "d2", "d3"]
    for row in rows:
        for entity in row["entities"]:
            assert row["text"][entity["start"] : entity["end"]] == entity["text"] == f"[{entity['label']}]"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pseudonyms_are_the_same_all_over_the_run_and_go_back(nermill, tmp_path, run, suffix):
    to, key, back = (tmp_path / name for name in (f"to.{suffix}", "names.key", f"back.{suffix}"))
    before = os.umask(0)
    assert nermill("redact", run, "--to", to, "--with", "pseudonym", "--key", key)[0] == 0
    os.umask(before)
    assert [row["text"] for row in rows_of(to)] == [
        "PER_1 met PER_2 in LOC_1", None, TEXTS[2], "PER_2 met PER_3 PER_4",
    ]  # fmt: skip
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    code, out, _ = nermill("restore", to, "--key", key, "--to", back, "--json")
    assert (code, json.loads(out)["documents"]) == (0, 4)
    assert [row["text"] for row in rows_of(back)] == TEXTS


def test_masks_have_the_length_of_what_they_hide(nermill, tmp_path, run):
    nermill("redact", run, "--to", tmp_path / "to.jsonl", "--with", "mask")
    texts = [row["text"] for row in rows_of(tmp_path / "to.jsonl")]
    assert texts == ["*** met *** in ******", None, TEXTS[2], "*** met ***** ***"]


def test_hashes_are_the_same_with_the_same_secret_alone(nermill, tmp_path, run):
    def hashed(name: str, *more: object) -> list[dict]:
        assert nermill("redact", run, "--to", tmp_path / name, "--with", "hash", *more)[0] == 0
        return rows_of(tmp_path / name)

    key = tmp_path / "secret"
    one, same = hashed("one.jsonl", "--key", key), hashed("same.jsonl", "--key", key)
    other = hashed("other.jsonl")
    assert one == same
    assert one != other
    assert one[0]["entities"][1]["text"] == one[3]["entities"][0]["text"]
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_only_some_labels_and_scores(nermill, tmp_path, run):
    nermill("redact", run, "--to", tmp_path / "a.jsonl", "--only", "PER")
    nermill("redact", run, "--to", tmp_path / "b.jsonl", "--min-score", "0.5")
    for name in ("a.jsonl", "b.jsonl"):
        row = rows_of(tmp_path / name)[0]
        assert row["text"] == "[PER] met [PER] in London"
        assert row["entities"][2]["redacted"] is False
        assert row["text"][slice(row["entities"][2]["start"], row["entities"][2]["end"])] == "London"


def test_documents_that_came_as_words_are_their_join(nermill, tmp_path):
    from tests.unit.evaluation.runs import Doc
    from tests.unit.evaluation.runs import make_run as run_of_words

    words = run_of_words(tmp_path, [Doc(["Ada", "met", "Bob"], ["B-PER", "O", "B-PER"], None)])
    assert nermill("redact", words.uri, "--to", tmp_path / "to.jsonl")[0] == 0
    assert rows_of(tmp_path / "to.jsonl")[0]["text"] == "[PER] met [PER]"


def test_a_wrong_input_is_one_line_and_writes_nothing(nermill, tmp_path, run):
    there, folder = tmp_path / "there.jsonl", tmp_path / "work"
    there.write_text("mine")
    folder.mkdir()
    partial = make_run(tmp_path / "out", DOCUMENTS, run_id="partial", per_shard=2, missing=1)
    gone = make_run(tmp_path / "out", DOCUMENTS, run_id="gone", keep_text=False)
    Path(gone.path(gone.shard_file(0))).unlink()
    to = folder / "to.jsonl"
    for arguments, said in (
        ((partial.uri, "--to", to), "not complete"),
        ((gone.uri, "--to", to), "tag the input again with --keep-text"),
        ((tmp_path, "--to", to), "no run here"),
        ((run, "--to", there), "exists already"),
        ((run, "--to", folder / "to.txt"), "let it end in .jsonl, .parquet, .csv"),
        ((run, "--to", "s3://bucket/to.jsonl"), "name a file on a disk"),
        ((run, "--to", to, "--with", "magic"), "--with 'magic'"),
        ((run, "--to", to, "--with", "pseudonym", "--key", there), "exists already"),
        ((run, "--to", to, "--with", "hash", "--key", there), "is no secret"),
        ((run, "--to", to, "--with", "pseudonym", "--key", to), "name two files"),
        ((run, "--to", to, "--key", folder / "key"), "--key goes with"),
        ((run, "--to", to, "--only", "PERSON", "--with", "pseudonym", "--key", folder / "key"), "run has: LOC, PER"),
    ):  # fmt: skip
        code, out, err = nermill("redact", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), (arguments, err)
        assert said in err
    assert (list(folder.iterdir()), there.read_text()) == ([], "mine")


def test_a_damaged_part_leaves_no_file(nermill, tmp_path, run):
    folder = tmp_path / "work"
    folder.mkdir()
    part = Path(run) / part_name(1)
    part.write_bytes(part.read_bytes()[:-9])
    more = ("--to", folder / "to.parquet", "--with", "pseudonym", "--key", folder / "key")
    code, _, err = nermill("redact", run, *more)
    assert (code, err.count("\n"), list(folder.iterdir())) == (1, 1, [])
    assert "part-00001.parquet: damaged part" in err


def test_a_wrong_key_or_file_restores_nothing(nermill, tmp_path, run):
    for name in ("one", "other"):
        more = ("--with", "pseudonym", "--key", tmp_path / f"{name}.key")
        assert nermill("redact", run, "--to", tmp_path / f"{name}.jsonl", *more)[0] == 0
    nermill("redact", run, "--to", tmp_path / "labels.jsonl")
    (tmp_path / "text").write_text("no key")
    (tmp_path / "cut.jsonl").write_text((tmp_path / "one.jsonl").read_text()[:-20])
    (tmp_path / "else.jsonl").write_text("{}\n")
    for source, key, said in (
        ("one.jsonl", "other.key", "was not made with the key"),
        ("labels.jsonl", "one.key", "was not made with the key"),
        ("one.jsonl", "nowhere", "no such key file"),
        ("one.jsonl", "text", "no key of pseudonyms"),
        ("nowhere.jsonl", "one.key", "cannot be read"),
        ("cut.jsonl", "one.key", "damaged after row 3"),
        ("else.jsonl", "one.key", "row 1 has no doc_index"),
    ):
        code, out, err = nermill("restore", tmp_path / source, "--key", tmp_path / key, "--to", tmp_path / "back.jsonl")
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert said in err
        assert not (tmp_path / "back.jsonl").exists()
