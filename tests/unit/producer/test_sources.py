"""Files of every format, complete and damaged, give their documents or one clear line."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import string
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pq

from nermill.producer.sources import ReadOptions, files, open_sources
from nermill.producer.sources.jsonl import parse_line
from nermill.worker.contracts import content
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import UsageError

FOUR = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP I-ORG\nrejects VBZ B-VP O\n\nBonn NNP B-NP I-LOC\n"
TWO = "Peter B-PER\nBlack I-PER\n\nhe O\n"


def read(*inputs: object, **options: object) -> list[Document]:
    wanted = ReadOptions(**options)  # type: ignore[arg-type]
    return [d for s in open_sources([str(i) for i in inputs], wanted).sources for d in s.documents(wanted)]


def faults(documents: list[Document]) -> list[str | None]:
    return [None if document.fault is None else document.fault.reason for document in documents]


def message_of(document: Document) -> str:
    assert document.fault is not None
    return document.fault.message


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def refused(match: str, *inputs: object, **options: object) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        read(*inputs, **options)
    assert "\n" not in str(caught.value)


class TestJsonl:
    def test_reads_ids_texts_and_kept_fields(self, write):
        path = write("a.jsonl", '{"id": 7, "text": "Ada", "lang": "en"}\n\n{"text": "Bob"}\n{"id": true, "text": "C"}')
        first, second, third = read(path, keep_fields=True)
        assert (first.id, first.text, first.fields) == ("7", "Ada", {"lang": "en"})
        assert (second.id, second.text, second.fields) == (f"{path}:3", "Bob", {})
        assert third.id == "true"

    def test_one_bad_document_costs_that_document(self, write):
        lines = [
            b'{"id": "ok", "text": "Ada"}', b'{"id": "e", "text": " "}', b'{"id": "m"}', b'{"id": "n", "text": null}',
            b'{"id": "w", "text": 3}', b'{"id": "u", "text": "\xff"}', b'{"id": "s", "text": "\\ud800"}',
            b'{"id": [1], "text": "x"}', b'[1]',
        ]  # fmt: skip
        path = write("a.jsonl", b"\n".join(lines))
        documents = read(path)
        assert faults(documents) == [
            None, "empty", "missing_field", "missing_field", "wrong_type", "not_utf8", "not_utf8",
            "wrong_type", "wrong_type",
        ]  # fmt: skip
        assert [d.id for d in documents[:7]] == ["ok", "e", "m", "n", "w", "u", "s"]
        assert documents[7].id == f"{path}:8"

    def test_broken_json_costs_its_line(self, write):
        path = write("a.jsonl", '{"text": "Ada"}\n{"text": \n{"text": "Bob"}\n' + "[" * 100_000)
        documents = read(path)
        assert faults(documents) == [None, "malformed", None, "malformed"]
        assert documents[1].id == f"{path}:2"
        assert message_of(documents[1]) == "broken JSON (Expecting value, column 10)"
        assert message_of(documents[3]) == "broken JSON (nested too deep)"
        refused(rf"{path}:2: broken JSON .*; correct it, or leave it out with --on-error reject", path, on_error="fail")

    def test_a_file_without_any_json_is_refused(self, write):
        path = write("a.jsonl", "Ada met Bob.\nCarol came.\n")
        refused(rf"{path}:1: broken JSON .*; no record of the file can be read", path)

    def test_no_text_field_anywhere_names_the_fields(self, write):
        path = write("a.jsonl", '{"id": 1, "body": "Ada"}\n{"id": 2, "body": "Bob"}\n')
        refused(rf"{path}:1: no field 'text' \(found: id, body\); name the text with --text-column", path)
        assert [d.text for d in read(path, text_column="body")] == ["Ada", "Bob"]

    def test_no_id_field_anywhere_is_named_where_one_was_asked_for(self, write):
        path = write("a.jsonl", '{"key": 1, "text": "Ada"}\n{"key": 2, "text": "Bob"}\n')
        refused(rf"{path}:1: no field 'kye' \(found: key, text\); name the id with --id-column", path, id_column="kye")
        assert [d.id for d in read(path)] == [f"{path}:1", f"{path}:2"]

    def test_lines_that_cannot_be_read_are_rejects_whatever_the_id_field(self, write, monkeypatch):
        monkeypatch.setattr(content, "MAX_LINE_BYTES", 64)
        path = write("a.jsonl", b'{"key": "a", "text": "\xff"}\n{"text": "' + b"x" * 100 + b'"}\n')
        documents = read(path, id_column="key")
        assert faults(documents) == ["not_utf8", "too_large"]
        assert documents[0].id == "a"
        path.write_bytes(path.read_bytes() + b'{"id": "b", "text": "Ada"}\n')
        refused(rf"{path}:3: no field 'key' \(found: id, text\)", path, id_column="key")

    def test_a_line_above_the_limit_is_one_reject(self, write, monkeypatch):
        monkeypatch.setattr(content, "MAX_LINE_BYTES", 64)
        path = write("a.jsonl", json.dumps({"text": "x" * 100}) + "\n" + json.dumps({"text": "Ada"}) + "\n")
        assert faults(read(path)) == ["too_large", None]

    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def test_any_unicode_text_comes_through(self, text):
        for ascii_only in (True, False):
            line = json.dumps({"id": "x", "text": text}, ensure_ascii=ascii_only).encode()
            document = parse_line(line, "w", ReadOptions())
            assert document.text == (text if text.strip() else None)


class TestConll:
    def test_four_columns_in_sentences_and_documents(self, write):
        path = write("a.txt", FOUR)
        first, second = read(path)
        assert (first.id, first.words, first.gold_tags) == (f"{path}:3", ("EU", "rejects"), ("B-ORG", "O"))
        assert (second.id, second.words, second.gold_tags) == (f"{path}:6", ("Bonn",), ("B-LOC",))
        [whole] = read(path, unit="document")
        assert (whole.words, whole.gold_tags) == (("EU", "rejects", "Bonn"), ("B-ORG", "O", "B-LOC"))

    def test_docstart_ends_documents(self, write):
        path = write("a.conll", FOUR + FOUR)
        assert [d.words for d in read(path, unit="document")] == [("EU", "rejects", "Bonn")] * 2
        assert len(read(path)) == 4

    @pytest.mark.parametrize(
        ("tags", "expected"),
        [
            ("I-PER I-PER B-PER O", "B-PER I-PER B-PER O"),
            ("B-PER I-PER B-PER O", "B-PER I-PER B-PER O"),
            ("B-PER E-PER S-PER O", "B-PER I-PER B-PER O"),
        ],
    )
    def test_schemes_become_iob2(self, write, tags, expected):
        path = write("a.conll", "".join(f"w\t{tag}\r\n" for tag in tags.split()))
        assert read(path)[0].gold_tags == tuple(expected.split())

    def test_words_keep_unusual_spaces(self, write):
        assert read(write("a.conll", "a\u00a0b O\nc\u2028 O\n"))[0].words == ("a\u00a0b", "c\u2028")

    def test_a_sentence_that_is_not_utf8_is_one_reject(self, write):
        assert faults(read(write("a.conll", b"caf\xe9 O\n\nBonn B-LOC\n"))) == ["not_utf8", None]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("EU NNP B-NP B-ORG\n", ":6: 4 columns where the file has 2"),
            ("alone\n", ":6: 1 column where the file has 2"),
            ("EU X-ORG\n", ":6: the tag 'X-ORG' is of no known scheme"),
        ],
    )
    def test_a_wrong_line_costs_its_sentence(self, write, line, message):
        path = write("a.conll", TWO + "\n" + line + "came O\n\nBonn B-LOC\n")
        documents = read(path)
        assert faults(documents) == [None, None, "malformed", None]
        assert message_of(documents[2]).startswith(f"{path}{message}")
        refused(f"{path}{message}.* --on-error reject", path, on_error="fail")

    def test_no_column_of_tags_is_named(self, write):
        refused(":1: 3 columns, and none holds tags", write("a.conll", "EU NNP NP\n"))


class TestText:
    def test_a_document_a_file_or_a_line(self, write):
        path = write("a.txt", "Ada met Bob.\r\n\nCarol came.\n")
        assert [(d.id, d.text) for d in read(path)] == [(str(path), "Ada met Bob.\r\n\nCarol came.\n")]
        assert [(d.id, d.text) for d in read(path, lines=True)] == [
            (f"{path}:1", "Ada met Bob."), (f"{path}:3", "Carol came."),
        ]  # fmt: skip

    def test_folder_of_texts_with_an_empty_and_a_latin1_file(self, write, tmp_path):
        write("docs/a.txt", "Ada"), write("docs/b.txt", ""), write("docs/c.txt", b"caf\xe9"), write("docs/.hidden", "x")
        write("docs/run=abc/part-00000.parquet", "x")
        documents = read(tmp_path / "docs")
        assert [d.id.rsplit("/", 1)[-1] for d in documents] == ["a.txt", "b.txt", "c.txt"]
        assert faults(documents) == [None, "empty", "not_utf8"]


class TestParquet:
    def test_columns_ids_and_fields(self, tmp_path):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"key": [1, 2, 3], "body": ["Ada", None, "Bob"], "n": [0.5, 1.5, float("nan")]}), path)
        first, second, third = read(path, id_column="key", text_column="body", keep_fields=True)
        assert (first.id, first.text, first.fields) == ("1", "Ada", {"n": 0.5})
        assert (second.id, faults([second])) == ("2", ["missing_field"])
        assert third.fields
        assert math.isnan(third.fields["n"])  # JSON's null, once it is in a shard
        refused(r"no field 'text' \(found: key, body, n\)", path)
        refused("column 'n' is double, not a string", path, text_column="n")
        refused(
            r"no field 'who' \(found: key, body, n\); name the id with --id-column",
            path,
            id_column="who",
            text_column="body",
        )

    def test_bytes_that_are_not_utf8(self, tmp_path):
        path = tmp_path / "a.parquet"
        text = pa.array([b"Ada", b"\xff"]).view(pa.string()) if hasattr(pa.Array, "view") else None
        pq.write_table(pa.table({"text": text}), path)
        assert faults(read(path)) == [None, "not_utf8"]

    def test_half_a_file(self, tmp_path, write):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": ["Ada"]}), path)
        refused("not a whole Parquet file", write("half.parquet", path.read_bytes()[:-20]))


class TestFiles:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "packed"])
    def test_compression_is_seen_by_content(self, write, name):
        content = b'{"text": "Ada"}\n{"text": "Bob"}\n'
        packed = {"gz": gzip.compress, "zst": lambda c: pa.compress(c, "zstd", asbytes=True)}
        pack = packed.get(name.rsplit(".")[-1], gzip.compress if name == "packed" else bytes)
        assert [d.text for d in read(write(name, pack(content)))] == ["Ada", "Bob"]

    @pytest.mark.parametrize("pack", [gzip.compress, lambda c: pa.compress(c, "zstd", asbytes=True)])
    def test_half_written_compression(self, write, pack):
        content = "".join(f'{{"text": "{n} {hash(n * 7919)}"}}\n' for n in range(20_000)).encode()
        whole = pack(content)
        refused("damaged or cut short", write("a.jsonl.x", whole[: len(whole) // 2]), format="jsonl")

    def test_a_bomb_is_refused(self, write, monkeypatch):
        monkeypatch.setattr(content, "BOMB_BYTES", 1 << 20)
        monkeypatch.setattr(content, "MAX_EXPANSION", 100)
        bomb = gzip.compress(b'{"text": "' + b"a" * (8 << 20) + b'"}\n')
        refused("expands more than 100 times", write("a.jsonl.gz", bomb))

    def test_globs_folders_and_uris(self, write, tmp_path):
        import fsspec

        write("d/b.jsonl", '{"text": "B"}'), write("d/e/a.jsonl", '{"text": "A"}')
        assert [d.text for d in read(tmp_path / "d" / "**" / "*.jsonl")] == ["B", "A"]
        assert [d.text for d in read(tmp_path / "d")] == ["B", "A"]
        with fsspec.open("memory://in/x.jsonl", "wb") as stream:
            stream.write(b'{"text": "M"}')
        for uri in ("memory://in/x.jsonl", "memory://in", "memory://in/*.jsonl"):
            assert [d.text for d in read(uri)] == ["M"]

    def test_standard_input_is_read_more_than_once(self, monkeypatch):
        files._spool.cache_clear()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(FOUR.encode())))
        documents = read("-")
        files._spool("-").close()
        files._spool.cache_clear()
        assert [d.id for d in documents] == ["-:3", "-:6"]

    def test_a_named_pipe_is_read_more_than_once(self, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        writer = threading.Thread(target=pipe.write_text, args=(FOUR,))
        writer.start()
        assert [d.id for d in read(pipe)] == [f"{pipe}:3", f"{pipe}:6"]
        writer.join()
        files._spool(str(pipe)).close()
        files._spool.cache_clear()

    def test_what_cannot_be_read_is_one_line(self, write, tmp_path):
        path = write("reports.jsonl", '{"text": "Ada"}')
        refused("no such file or folder; did you mean .*reports.jsonl", tmp_path / "report.jsonl")
        refused("no file fits this pattern", tmp_path / "*.nope")
        refused("the file is empty", write("empty.jsonl", ""))
        refused("the file is empty", write("blank.conll", "\n\n"))
        refused("no files in this folder", write("folder/.x", "").parent)
        refused("nobody://x: Protocol not known", "nobody://x")
        refused("UTF-16", write("u.txt", "Ada".encode("utf-16")))
        refused("the suffix .bin is of no known format, and it is not text; known are", write("a.bin", b"\x7fELF\0\0"))
        refused("broken JSON", path, write("b.txt", "Ada"), format="jsonl")

    def test_mixed_formats_in_a_folder(self, write):
        write("d/a.jsonl", '{"text": "A"}')
        refused("mixed formats", write("d/b.conll", TWO).parent)


@given(st.lists(st.text(string.ascii_letters, min_size=1), min_size=1))
def test_every_format_carries_the_same_words(tmp_path_factory, words):
    folder, text = tmp_path_factory.mktemp("formats"), " ".join(words)
    (folder / "a.conll").write_text("".join(f"{word} O\n" for word in words))
    (folder / "a.jsonl").write_text(json.dumps({"text": text}))
    (folder / "a.txt").write_text(text)
    pq.write_table(pa.table({"text": [text]}), folder / "a.parquet")
    [conll] = read(folder / "a.conll")
    assert conll.words == tuple(words)
    for name, chosen in (("a.jsonl", None), ("a.txt", "text"), ("a.parquet", None)):
        [document] = read(folder / name, format=chosen)
        assert document.text == text
