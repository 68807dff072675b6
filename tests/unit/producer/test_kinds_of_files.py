"""Kinds of files that users have: which are read, with how many documents and gold tags, and which are refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq

from nermill.producer.sources import ReadOptions, open_sources
from nermill.worker.contracts.document import Document, Fault
from nermill.worker.contracts.errors import UsageError

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"


def read(path: Path, **options: Any) -> tuple[str, list[Document]]:
    wanted = ReadOptions(**options)
    (source,) = open_sources([str(path)], wanted).sources
    return source.format, list(source.documents(wanted))


class Kind(NamedTuple):
    """A kind of file: its number of documents, gold tags and rejects, or the message with which it is refused."""

    name: str
    content: str | bytes | Callable[[Path], None]
    format: str = ""
    documents: int = 0
    gold: int = 0
    rejects: tuple[str, ...] = ()
    refusal: str = ""
    options: dict[str, Any] = {}  # noqa: RUF012 - nobody changes it


def table(**columns: Any) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


def hugging_face(path: Path) -> None:
    """A file as Hugging Face datasets writes it: tags as numbers, with names in the file's metadata."""
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    features = {"tokens": {}, "ner_tags": {"_type": "List", "feature": {"_type": "ClassLabel", "names": names}}}
    made = pa.table({"tokens": [["Ada", "L."], ["Bonn"], ["x"]], "ner_tags": [[1, 2], [3], [9]]})
    pq.write_table(made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path)


GERMEVAL = "#\thttp://de.wikipedia.org [2009-10-17]\n1\tAda\tB-PER\tO\n2\tBonn\tB-LOC\tO\n\n1\tx\tO\tO\n"
CONLLU = (
    "# newdoc id = d1\n# sent_id = s1\n1-2\tzum\t_\t_\t_\t_\t_\t_\t_\t_\n"
    "1\tzu\t_\t_\t_\t_\t_\t_\t_\t_\n"
    "2\tdem\t_\t_\t_\t_\t_\t_\t_\t_\n2.1\tnull\t_\t_\t_\t_\t_\t_\t_\t_\n\n"
    "# sent_id = s2\n1\tx\t_\t_\t_\t_\t_\t_\t_\t_\n"
)
CSV = 'id,text\n1,"Ada, ""Countess""\nof Lovelace"\n2,Bob\n'
LINES = '{"id": 1, "text": "Ada"}\n{"id": 2, "text": "Bob"}\n'
TOKENS = '{"tokens": ["Ada", "came"], "tags": ["I-PER", "O"]}\n{"tokens": ["x"]}\n'
NUMBERS = '{"tokens": ["Ada"], "ner_tags": [1]}'
CONLL = "EU NNP B-NP B-ORG\nis VBZ O O\n\nBonn NNP B-NP B-LOC\n"

KINDS = [
    Kind("a.jsonl", LINES, "jsonl", 2),
    Kind("a.ndjson", LINES, "jsonl", 2),
    Kind("crlf.jsonl", LINES.replace("\n", "\r\n"), "jsonl", 2),
    Kind("bom.jsonl", "\ufeff" + LINES, "jsonl", 2),
    Kind("lines.json", LINES, "jsonl", 2),
    Kind("lines", LINES, "jsonl", 2),
    Kind("tokens.jsonl", TOKENS, "jsonl", 2, 1),
    Kind("numbers.jsonl", NUMBERS, "jsonl", 1, 1, options={"tag_names": ("O", "B-PER")}),
    Kind("numbers.jsonl", NUMBERS, refusal="the tag 1 is a number without a name; .*--tag-names O,B-PER"),
    Kind("uneven.jsonl", '{"tokens": ["Ada", "x"], "tags": ["O"]}\n' + LINES, "jsonl", 3, 0, ("malformed",)),
    Kind("string.jsonl", '{"tokens": "Ada came"}\n' + LINES, "jsonl", 3, 0, ("wrong_type",)),
    Kind("hole.jsonl", '{"tokens": ["Ada", ""]}\n' + LINES, "jsonl", 3, 0, ("empty",)),
    Kind("broken.jsonl", LINES + '{"id": 3, "text"\n', "jsonl", 3, 0, ("malformed",)),
    Kind("broken.jsonl", LINES + "{\n", refusal=":3: broken JSON .* --on-error reject", options={"on_error": "fail"}),
    Kind("prose.jsonl", "Ada met Bob.\n", refusal=":1: broken JSON .*; no record of the file can be read"),
    Kind(
        "nowhere.jsonl", '{"body": "Ada"}', refusal=r"no field 'text' \(found: body\); name the text with --text-column"
    ),
    Kind("a.json", json.dumps([{"id": 1, "text": "Ada"}, {"text": "B"}, 3], indent=1), "json", 3, 0, ("wrong_type",)),
    Kind("tokens.json", '[{"tokens": ["Ada"], "tags": ["S-PER"]}]', "json", 1, 1),
    Kind("cut.json", '[{"text": "Ada"},\n {"text": "B', refusal=":2: broken JSON"),
    Kind("more.json", '[{"text": "Ada"}]\n[]', refusal=":2: more after the array's end"),
    Kind("one.json", '{\n "text": "Ada"\n}\n', refusal=":1: one JSON object over several lines"),
    Kind("empty.json", "[]", refusal="the file is empty"),
    Kind("word.json", "Ada", refusal="no JSON"),
    Kind("a.csv", CSV, "csv", 2),
    Kind("bom.csv", "\ufeff" + CSV.replace("\n", "\r\n"), "csv", 2),
    Kind("semicolon.csv", "id;text\n1;Ada, Bob\n", "csv", 1),
    Kind("pipe.csv", "id|text\n1|Ada, Bob\n", "csv", 1),
    Kind("colon.csv", "id:text\n1:Ada\n", "csv", 1, options={"delimiter": ":"}),
    Kind("a.tsv", "id\ttext\n1\tAda\n\n2\tBob\n", "tsv", 2),
    Kind("short.csv", "id,text\n1,Ada\n2\n3,Bob\n", "csv", 3, 0, ("malformed",)),
    Kind("quote.csv", 'id,text\n1,"Ada" B\n2,"Bob\n3,Carol\n', "csv", 3, 0, ("malformed", "malformed")),
    Kind("latin.csv", b"id,text\n1,caf\xe9\n2,Bob\n", "csv", 2, 0, ("not_utf8",)),
    Kind("tokens.csv", 'tokens,ner_tags\n"[""Ada""]","[1]"\n', refusal="a cell of 'tokens' cannot hold a list"),
    Kind(
        "words.tsv", "id\twords\n1\tAda met\n", refusal=":1: no field 'text', and a cell of 'words' cannot hold a list"
    ),
    Kind("words.csv", "id,words\n1,Ada met\n", "csv", 1, options={"text_column": "words"}),
    Kind("headless.csv", "1,Ada\n2,Bob\n", refusal=r":1: no field 'text' \(found: 1, Ada\)"),
    Kind("a.parquet", table(id=[1, 2], text=["Ada", None]), "parquet", 2, 0, ("missing_field",)),
    Kind("tokens.parquet", table(tokens=[["Ada"], ["x"]], ner_tags=[["B-PER"], ["O"]]), "parquet", 2, 2),
    Kind("hf.parquet", hugging_face, "parquet", 3, 2, ("malformed",)),
    Kind("string.parquet", table(tokens=["Ada"]), refusal="column 'tokens' is string, not a list of words"),
    Kind("numbers.parquet", table(text=[[1]]), refusal="not a string or a list of words"),
    Kind("a.conll", CONLL, "conll", 2, 2),
    Kind("a.txt", CONLL, "conll", 2, 2),
    Kind("docstart.conll", "-DOCSTART- -X- O O\n\n" + CONLL, "conll", 1, 1, options={"unit": "document"}),
    Kind("two.bio", "Ada\tB-PER\n#tag\tO\n#\tO\n", "conll", 1, 1),
    Kind("three.conllu", "1\tAda\tB-PER\n2\tx\tO\n\n1\ty\tO\n", "conll", 2, 2),
    Kind("a.conllu", CONLLU, "conll", 2),
    Kind("germeval.tsv", GERMEVAL, "conll", 2, 2),
    Kind("spaces.iob2", "New York\tB-LOC\n10\u00a0000\tO\n", "conll", 1, 1),
    Kind("untagged.conll", "Ada\nmet\n\nBob\n", "conll", 2),
    Kind("hole.conll", "Ada\tB-PER\n\n\tO\nx\tO\n\nBob\tO\n", "conll", 3, 2, ("empty",)),
    Kind("odd.conll", CONLL + "x y\n\nz O O O\n", "conll", 3, 2, ("malformed",)),
    Kind("odd.conll", CONLL + "x y\n", refusal=":5: 2 columns where the file has 4", options={"on_error": "fail"}),
    Kind("swapped.conll", "B-PER Ada\nO x\n", "conll", 1, 1, options={"word_column": 2, "tag_column": 1}),
    Kind("back.conll", CONLL, "conll", 2, 2, options={"word_column": 1, "tag_column": -1}),
    Kind("far.conll", CONLL, refusal="its lines have 4 columns, --tag-column says 9", options={"tag_column": 9}),
    Kind("plain.conll", "Ada PER\nx NN\n", refusal=":1: 2 columns, and none holds tags"),
    Kind("words.conll", "Ada PER\nx NN\n", "conll", 1, options={"word_column": 1}),
    Kind("webanno.tsv", "#FORMAT=WebAnno TSV 3.3\n\n#Text=x\n1-1\t0-1\tx\t_\n", refusal="a WebAnno TSV file; export"),
    Kind("prose.txt", "Ada met Bob.\n\nThen, she left.\n", "text", 1),
    Kind("prose.md", "# Ada\n\nShe met Bob.\n", "text", 1),
    Kind("lines.txt", "Ada\nBob\n", "text", 2, options={"lines": True}),
    Kind("prose.log", "Ada met Bob.\n", refusal=r"the suffix .log is of no known format.*JSONL, JSON, CSV.*--format"),
    Kind("prose.log", "Ada met Bob.\n", "text", 1, options={"format": "text"}),
    Kind("prose", "Ada met Bob.\n", refusal="no suffix says its format"),
    Kind("page.html", "<html><body>Ada</body></html>", refusal="the suffix .html is of no known format"),
    Kind("table.txt", CSV, refusal="looks like a table with ','.*--format csv"),
    Kind("table.txt", "a\tb\nc\td\ne\tf\n", refusal="looks like a table with tabs"),
    Kind("a.docx", b"PK\x03\x04\0\0", refusal="the suffix .docx is of no known format, and it is not text"),
    Kind("utf16.csv", CSV.encode("utf-16"), refusal="UTF-16 text; convert it to UTF-8"),
    Kind("empty.csv", "", refusal="the file is empty"),
    Kind("header.csv", "id,text\n", refusal="the file is empty"),
    Kind("a.jsonl.gz", gzip.compress(LINES.encode()), "jsonl", 2),
    Kind("a.csv.bz2", bz2.compress(CSV.encode()), "csv", 2),
    Kind("a.conll.xz", lzma.compress(CONLL.encode()), "conll", 2, 2),
    Kind("a.json.zst", pa.compress(b'[{"text": "Ada"}]', "zstd", asbytes=True), "json", 1),
    Kind("half.jsonl.xz", lzma.compress(LINES.encode() * 9000)[:80], refusal="damaged or cut short"),
    Kind("half.jsonl.bz2", bz2.compress(LINES.encode())[:30], refusal="damaged or cut short"),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name}-{'-'.join(kind.options)}")
def test_a_kind_of_file(tmp_path: Path, kind: Kind) -> None:
    path = tmp_path / kind.name
    if callable(kind.content):
        kind.content(path)
    else:
        path.write_bytes(kind.content.encode() if isinstance(kind.content, str) else kind.content)
    if kind.refusal:
        with pytest.raises(UsageError, match=kind.refusal) as caught:
            read(path, **kind.options)
        assert str(caught.value).startswith(f"{path}:")
        assert "\n" not in str(caught.value)
        return
    found, documents = read(path, **kind.options)
    rejects = tuple(document.fault.reason for document in documents if document.fault)
    gold = sum(document.gold_tags is not None for document in documents)
    assert (found, len(documents), gold, rejects) == (kind.format, kind.documents, kind.gold, kind.rejects)
    for document in documents:  # a reject says where it stands
        assert document.fault is None or f"{path}:" in document.id + document.fault.message


def test_csv_keeps_line_breaks_and_quotes_and_names_the_line_of_a_reject(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(CSV + "3\n4,Dan\n")
    _, documents = read(path, keep_fields=True)
    assert [(d.id, d.text) for d in documents if not d.fault] == [
        ("1", 'Ada, "Countess"\nof Lovelace'), ("2", "Bob"), ("4", "Dan"),
    ]  # fmt: skip
    assert documents[2] == Document(f"{path}:5", fault=Fault("malformed", "1 field where the header has 2"))


def test_a_quote_that_is_never_closed_costs_its_record_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,Ada\n2,"Bob\n3,Carol\n4,"Dan"\n5,"Eve\n6,Fay\n')
    _, documents = read(path)
    assert [d.text for d in documents if not d.fault][-1] == "Fay"
    assert documents[-2].id == f"{path}:6"


def test_names_in_comments_are_ids(tmp_path: Path) -> None:
    path = tmp_path / "a.conllu"
    path.write_text(CONLLU)
    assert [(d.id, d.words) for d in read(path)[1]] == [("s1", ("zu", "dem")), ("s2", ("x",))]
    assert [(d.id, d.words) for d in read(path, unit="document")[1]] == [("d1", ("zu", "dem", "x"))]


@pytest.mark.parametrize("tags", ["B-PER I-PER B-PER O", "I-PER I-PER B-PER O", "B-PER E-PER S-PER O"])
def test_every_scheme_is_iob2_in_every_format(tmp_path: Path, tags: str) -> None:
    words, given = ["a", "b", "c", "d"], tags.split()
    (tmp_path / "a.conll").write_text("".join(f"{w} {t}\n" for w, t in zip(words, given, strict=True)))
    (tmp_path / "a.json").write_text(json.dumps([{"tokens": words, "tags": given}]))
    table(tokens=[words], tags=[given])(tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        assert read(path)[1][0].gold_tags == ("B-PER", "I-PER", "B-PER", "O")


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "README.md").write_text("# Data\n")
        (tmp_path / "LICENSE").write_text("free\n")
        (tmp_path / "a.jsonl").write_text(LINES)
        (tmp_path / "b.jsonl").write_text(LINES)
        return tmp_path

    def test_documentation_beside_data_is_left_out_however_it_is_named(self, folder: Path) -> None:
        expanded = sorted(str(path) for path in folder.iterdir())
        found = [open_sources(inputs, ReadOptions()) for inputs in ([str(folder)], [f"{folder}/*"], expanded)]
        for one in found:
            assert [Path(source.file.uri).name for source in one.sources] == ["a.jsonl", "b.jsonl"]
            assert one.left_out == [f"{folder}/LICENSE (documentation)", f"{folder}/README.md (documentation)"]

    def test_documentation_alone_is_read(self, folder: Path) -> None:
        assert read(folder / "README.md")[0] == "text"

    def test_unknown_files_are_left_out_of_a_folder_and_refused_elsewhere(self, folder: Path) -> None:
        (folder / "c.bin").write_bytes(b"\0")
        found = open_sources([str(folder)], ReadOptions())
        assert len(found.sources) == 2
        assert found.left_out[-1].startswith(f"{folder}/c.bin: the suffix .bin is of no known format")
        for inputs in ([f"{folder}/*"], sorted(str(path) for path in folder.iterdir())):
            with pytest.raises(UsageError, match=r"c\.bin: the suffix \.bin is of no known format"):
                open_sources(inputs, ReadOptions())

    def test_a_folder_of_unknown_files_alone_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "c.bin").write_bytes(b"\0")
        with pytest.raises(UsageError, match=r"the suffix \.bin is of no known format"):
            open_sources([str(tmp_path)], ReadOptions())


words = st.text(string.ascii_letters + "éßΩЖ'\",;|", min_size=1, max_size=8).filter(lambda w: not w.startswith("#"))
tagged = st.lists(st.lists(st.tuples(words, st.sampled_from(["O", "B-PER", "B-LOC"])), min_size=1), min_size=1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tagged)
def test_the_same_documents_are_one_table_in_every_format(tmp_path: Path, sentences: list) -> None:
    """Words with tags as CoNLL, JSONL, JSON and Parquet; their texts as CSV, TSV, JSONL, JSON and Parquet."""
    import csv

    ids = [f"d{n}" for n in range(len(sentences))]
    tokens = [[word for word, _ in sentence] for sentence in sentences]
    tags = [[tag for _, tag in sentence] for sentence in sentences]
    split: list[dict[str, Any]] = [{"id": i, "tokens": w, "tags": t} for i, w, t in zip(ids, tokens, tags, strict=True)]
    plain = [{"id": i, "text": " ".join(w)} for i, w in zip(ids, tokens, strict=True)]
    lines = ["".join(f"{w}\t{t}\n" for w, t in sentence) for sentence in sentences]
    (tmp_path / "w.conll").write_text("\n".join(f"# sent_id = {i}\n{s}" for i, s in zip(ids, lines, strict=True)))
    for name, records in (("w", split), ("t", plain)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (tmp_path / f"{name}.json").write_text(json.dumps(records, indent=2, ensure_ascii=False))
        pq.write_table(pa.Table.from_pylist(records), tmp_path / f"{name}.parquet")
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with (tmp_path / f"t.{suffix}").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["id", "text"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(plain)
    for expected, names in (
        ([Document(r["id"], words=tuple(r["tokens"]), gold_tags=tuple(r["tags"])) for r in split], "w.*"),
        ([Document(r["id"], text=r["text"]) for r in plain], "t.*"),
    ):
        for path in tmp_path.glob(names):
            assert read(path)[1] == expected, path.name


CORPORA = {  # documents, documents with gold, entities
    "btc/a.conll": (1000, 1000, 521),
    "btc/h.conll": (2001, 1998, 3368),
    "conll2003/valid.txt": (3250, 3250, 5942),
    "crossner/politics/dev.txt": (541, 541, 3482),
    "crossner/science/dev.txt": (450, 450, 2538),
    "uner_ewt/dev.iob2": (2001, 2001, 966),
    "wikigold/wikigold.conll.txt": (1696, 1696, 3558),
    "wnut17/dev.conll": (1009, 1009, 836),
    "wnut17/train.conll": (3394, 3394, 1975),
}


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus(name: str) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    found, documents = read(path)
    gold = [document.gold_tags for document in documents if document.gold_tags is not None]
    assert (found, len(documents), len(gold), sum(tag[0] == "B" for tags in gold for tag in tags)) == (
        "conll",
        *CORPORA[name],
    )
