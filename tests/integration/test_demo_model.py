"""Promise 2 on the model that is shipped: what a document is batched with changes nothing about it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nermill.worker import Tagger


@pytest.fixture(scope="module")
def tagger() -> Iterator[Tagger]:
    with Tagger.load("demo") as made:
        yield made


@pytest.fixture(scope="module")
def texts(sample: Path) -> list[str]:
    """Long documents and their sentences, so that a batch holds windows of every length."""
    documents = [json.loads(line)["text"] for line in (sample / "wikigold.jsonl").read_text("utf-8").splitlines()]
    return [*documents[:6], *(sentence + "." for document in documents for sentence in document.split(". "))][:150]


@pytest.mark.slow
def test_tags_are_the_same_alone_among_others_and_in_another_order(tagger: Tagger, texts: list[str]) -> None:
    together = tagger.tag(texts)
    alone = [tagger.tag([text])[0] for text in texts]
    order = random.Random(0).sample(range(len(texts)), len(texts))
    shuffled = dict(zip(order, tagger.tag([texts[i] for i in order]), strict=True))
    for index, annotation in enumerate(together):
        assert annotation == alone[index] == shuffled[index]  # scores too, to the last bit


def test_a_long_document_is_tagged_to_its_end(tagger: Tagger) -> None:
    filler = "The weather was as it had been on every other day of that long and quiet summer. " * 200
    text = filler + "Then Ada Lovelace came to London."
    found = {entity.text: entity.label for entity in tagger.tag([text])[0].entities}
    assert found["Ada Lovelace"] == "PER"
    assert found["London"] == "LOC"
