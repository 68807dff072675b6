"""Texts for measurements, read from each kind of file."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

from nermill.model_build.corpus import Text, read_texts
from nermill.worker.contracts.errors import UsageError


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "Oslo is cold .\n\nYes\n", [Text("Oslo is cold ."), Text("Yes")]),
        ("a.jsonl", '{"id": 1, "text": "Oslo"}\n\n{"text": "Rome"}\n', [Text("Oslo"), Text("Rome")]),
        (
            "a.conll",
            "-DOCSTART- -X- -X- O\n\nOslo NNP B-NP B-LOC\nis VBZ B-VP O\n\nRome NNP B-NP B-LOC",
            [Text(("Oslo", "is"), ("B-LOC", "O")), Text(("Rome",), ("B-LOC",))],
        ),
        ("a.iob", "Oslo I-LOC\n", [Text(("Oslo",), ("I-LOC",))]),
    ],
)
def test_formats(tmp_path: Path, name: str, content: str, expected: list[Text]) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    assert read_texts([str(tmp_path / name)]) == expected


def test_documents_of_conll(tmp_path: Path) -> None:
    content = "Oslo B-LOC\n\n-DOCSTART- O\n\nRome B-LOC\n\nis O\ncold O\n-DOCSTART- O\n"
    (tmp_path / "a.conll").write_text(content, "utf-8")
    assert read_texts([str(tmp_path / "a.conll")], "document") == [
        Text(("Oslo",), ("B-LOC",)),
        Text(("Rome", "is", "cold"), ("B-LOC", "O", "O")),
    ]


@pytest.mark.parametrize(("content", "message"), [(b"", "holds no text"), (b"\xff\xfe", "cannot be read")])
def test_file_without_texts(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_texts([str(tmp_path / "a.txt")])
