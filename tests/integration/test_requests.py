"""Requests: a few documents in, their annotations out, beside shards, for our producer and any Celery program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nermill.producer import Producer
from nermill.worker import Tagger
from nermill.worker.contracts.document import Annotation
from nermill.worker.contracts.errors import BrokerError, UsageError
from nermill.worker.contracts.message import MAX_REQUEST_CHARACTERS, MAX_REQUEST_DOCUMENTS, TAG_DOCUMENTS
from tests.harness import REAL, Harness, rows, texts

TEXTS = ["Ada Lovelace met Charles Babbage in London.", "", "No name here."]


@pytest.fixture(scope="module")
def expected() -> list[Annotation]:
    with Tagger.load("demo") as tagger:
        return tagger.tag(TEXTS)


def test_the_producer_and_any_celery_program_are_answered(fleet: Harness, expected: list[Annotation]) -> None:
    fleet.worker(REAL).await_ready()
    with Producer(broker=fleet.server.url) as producer:
        answers = producer.tag(TEXTS)
        assert answers == expected
        assert answers[0].entities
        assert answers[1].fault is not None
        (words,) = producer.tag([["Ada", "Lovelace", "sang"]])
        assert words.tags == ("B-PER", "I-PER", "O")
        with pytest.raises(UsageError, match=r"1001 documents: a request has 1000 at most"):
            producer.tag(["x"] * (MAX_REQUEST_DOCUMENTS + 1))
        with pytest.raises(UsageError, match=r"characters: a request has 1000000 at most"):
            producer.tag(["x" * (MAX_REQUEST_CHARACTERS + 1)])
        with pytest.raises(UsageError, match="texts and lists of words in one request"):
            producer.tag(["Ada", ["met"]])
        with pytest.raises(TypeError, match="a single text"):
            producer.tag("Ada")
        with pytest.raises(UsageError, match="only tag works without one"):
            producer.send("Ada")
    result = fleet.app().send_task(TAG_DOCUMENTS, args=[[TEXTS[0]]], queue="nermill").get(timeout=30)
    assert [entity["text"] for entity in result[0]["entities"]] == [e.text for e in expected[0].entities]
    with pytest.raises(Exception, match="options: unknown options"):
        fleet.app().send_task(TAG_DOCUMENTS, args=[["x"], {"colour": 1}], queue="nermill").get(timeout=30)


@pytest.mark.slow
def test_a_request_is_answered_while_shards_are_under_way(fleet: Harness) -> None:
    run, plan = fleet.submit(texts(600))
    fleet.worker(FAULT_BATCH_SECONDS="0.3").await_ready()
    fleet.until(run.committed)
    with Producer(broker=fleet.server.url) as producer:
        assert len(producer.tag(["Ada met Bob."], timeout=20)) == 1
    assert len(run.committed()) < len(plan.shards), "it was answered before the run was over"
    fleet.wait(run, plan)
    assert len(rows(run)) == 600


def test_without_a_worker_a_request_says_so(fleet: Harness) -> None:
    with (
        Producer(broker=fleet.server.url) as producer,
        pytest.raises(BrokerError, match="no answer in 1 s, and no worker is at this broker; start nermill-worker"),
    ):
        producer.tag(["Ada"], timeout=1)


def test_the_command_asks_the_workers(fleet: Harness, tmp_path: Path) -> None:
    fleet.worker(REAL).await_ready()
    command = [str(Path(sys.executable).with_name("nermill")), "tag", TEXTS[0], "--broker", fleet.server.url]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "[Ada Lovelace PER]" in done.stdout
