"""The producer from Python."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from nermill.producer import Producer
from nermill.producer.entities.show import read_rows
from nermill.producer.runs.rejects import read_rejects
from nermill.producer.runs.run import open_run
from nermill.worker.contracts.errors import UsageError


def test_sent_documents_come_out_in_order(broker, serving, tmp_path):
    with Producer(str(tmp_path), broker=broker, linger=0.05) as producer, serving():
        indexes = [producer.send("Ada met Bob", id="a"), producer.send(["Carol", "came"]), producer.send(" ")]
        producer.flush()
        assert producer.status().state == "running"
        status = producer.wait()
    assert (indexes, status.state, status.ok, status.rejected) == ([0, 1, 2], "complete", 2, 1)
    run, plan = open_run(status.run)
    rows = [shown.row for shown in read_rows(run, plan, None)]
    assert [row["doc_id"] for row in rows] == ["a", "1", "2"]
    assert [entity["text"] for entity in rows[0]["entities"]] == ["Ada", "Bob"]
    assert rows[1]["tags"] == ["B-PER", "O"]
    assert [row["reason"] for row in read_rejects(run, plan)] == ["empty"]


def test_submitted_files_meet_their_run_again(broker, serving, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"text": "Ada"}))
    with Producer(str(tmp_path / "out"), broker=broker) as producer, serving():
        run = producer.submit(str(path))
        assert producer.wait(run).ok == 1
        assert producer.submit(str(path)) == run
        assert producer.status(run).state == "complete"


def test_waiting_for_nothing_is_refused(broker, tmp_path):
    with Producer(str(tmp_path), broker=broker) as producer, pytest.raises(UsageError, match="nothing was sent"):
        producer.wait()


@pytest.mark.parametrize("statement", ["import nermill.producer.cli", "from nermill.producer import Producer"])
def test_imports_stay_light(statement):
    code = f"{statement}; import sys; print([m for m in ('torch', 'transformers', 'onnxruntime') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
