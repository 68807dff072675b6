"""``nermill tag``: texts to marked entities at once, the model in a process of its own."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys

import pytest

from nermill.producer.entities.tagging import local_tagger
from nermill.worker.contracts.errors import EngineError

pytest.importorskip("onnxruntime")
TEXT = "Ada Lovelace met Charles Babbage in London."
CPU_SECONDS = 3.0  # of both processes; 1.4 s measured, which two idle cores share. Others may work on them too


def tag(*arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "nermill.producer.cli", "tag", *arguments]
    return subprocess.run(command, input=given, capture_output=True, timeout=60, check=False)


def test_a_text_is_marked_at_once():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = tag(TEXT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == "[Ada Lovelace PER] met [Charles Babbage PER] in [London LOC].\n"


def test_json_is_an_object_a_text_with_offsets_in_code_points():
    texts = ["\N{GRINNING FACE} Ada Lovelace lived in London.", "nothing here"]
    done = tag(*texts, "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["text"], row["status"]) for row in rows] == [(text, "ok") for text in texts]
    assert [e["label"] for e in rows[0]["entities"]] == ["PER", "LOC"]
    assert rows[1]["entities"] == []
    for row in rows:
        for entity in row["entities"]:
            assert row["text"][entity["start"] : entity["end"]] == entity["text"]
            assert 0 < entity["score"] <= 1


def test_standard_input_is_one_text_or_one_a_line():
    given = b"Ada Lovelace\nlived in London.\r\n\n"
    whole = json.loads(tag("--json", given=given).stdout)
    assert [e["text"] for e in whole["entities"]] == ["Ada Lovelace", "London"]
    rows = [json.loads(line) for line in tag("--json", "--lines", given=given).stdout.splitlines()]
    assert [row["text"] for row in rows] == ["Ada Lovelace", "lived in London."]


def test_one_empty_text_costs_that_text():
    done = tag("", TEXT, "--json")
    assert done.returncode == 3
    assert [json.loads(line)["status"] for line in done.stdout.splitlines()] == ["rejected", "ok"]
    assert done.stderr.decode() == "nermill: text 1: empty: the document has no text\n"


@pytest.mark.parametrize(
    ("arguments", "given", "said"),
    [
        (("--model", "nowhere", "Ada"), b"", "nowhere: no model artifact"),
        (("--device", "gpu", "Ada"), b"", "--device 'gpu': say cpu"),
        (("--device", "cuda:0", "Ada"), b"", "cuda:0"),
        ((), b" \n", "no text"),
        ((), b"\xff", "not UTF-8 (byte 0)"),
    ],
)
def test_a_wrong_input_is_one_line(arguments, given, said):
    done = tag(*arguments, given=given)
    assert (done.returncode, done.stdout) == (2, b"")
    assert said in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1


def test_a_model_whose_process_dies_is_named(monkeypatch):
    monkeypatch.setattr(
        "nermill.producer.entities.tagging.python_command", lambda *_: [sys.executable, "-c", "exit(9)"]
    )
    with local_tagger() as tagger, pytest.raises(EngineError, match="the process of the model ended with 9"):
        tagger.tag([TEXT])


def test_no_process_is_left_behind():
    def interrupted() -> None:
        with local_tagger() as tagger:
            children.append(tagger._process)
            raise KeyboardInterrupt

    children: list[subprocess.Popen[str]] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert children[0].returncode == -signal.SIGKILL
