"""A document's tags do not depend on other documents, on their order, on the batch size or on the layout."""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer

from nermill.worker.contracts.document import Annotation, Document
from nermill.worker.contracts.errors import EngineError, UsageError
from nermill.worker.contracts.manifest import TOKENIZER_FILE, resolve_artifact
from nermill.worker.contracts.plan import Options
from nermill.worker.contracts.shard import shard_table
from nermill.worker.engine import Batch
from nermill.worker.tagging.pipeline import Pipeline
from nermill.worker.tagging.pool import Job, Pool, build_batch, distribute_logits
from nermill.worker.tagging.tagger import Tagger
from nermill.worker.tagging.tokens import Tokens
from nermill.worker.tagging.windows import SPECIAL_TOKENS, Windows, split_into_windows
from tests.doubles.engine import HashEngine, manifest

PIECES = st.sampled_from(
    [*"abc ABC.,-'\r\n\t\0", "é", "e\u0301", "ß", "İ", "我", "א", "ع", "\u200f", "👩‍👩‍👧", "🇺🇳", "\ufeff"]
)
TEXTS = st.lists(PIECES, max_size=60).map("".join) | st.text(max_size=40)
LONG_TEXTS = st.lists(PIECES, min_size=200, max_size=600).map("".join)
WORD = st.lists(PIECES.filter(lambda piece: not piece.isspace()), min_size=1, max_size=6).map("".join)
LAYOUTS = [
    {},
    {"token_budget": 32},
    {"shapes": ((4, 64),)},
    {"shapes": ((1, 64), (8, 128))},
    {"shapes": ((4, 64),), "layout": "plain"},
    {"layout": "equal", "token_budget": 64},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(resolve_artifact("demo") / TOKENIZER_FILE))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@contextmanager
def tagger(tokenizer: Tokenizer, engine: HashEngine) -> Iterator[Tagger]:
    with Tagger(Pipeline(engine, tokenizer)) as made:
        yield made


def tag(tokenizer: Tokenizer, documents: list, **layout: object) -> list[Annotation]:
    with tagger(tokenizer, HashEngine(manifest(**layout))) as made:  # type: ignore[arg-type]
        return made.tag(documents, overlap=16)


PROPERTY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@PROPERTY
@given(texts=st.lists(TEXTS, min_size=1, max_size=12), layout=st.sampled_from(LAYOUTS), data=st.data())
@pytest.mark.slow
def test_tags_do_not_depend_on_neighbours_order_or_layout(
    tokenizer: Tokenizer, texts: list[str], layout: dict, data: st.DataObject
) -> None:
    together = tag(tokenizer, texts, **layout)
    assert together == [tag(tokenizer, [text])[0] for text in texts]
    order = data.draw(st.permutations(range(len(texts))))
    assert tag(tokenizer, [texts[i] for i in order], **layout) == [together[i] for i in order]


@PROPERTY
@given(text=TEXTS | LONG_TEXTS)
def test_an_entity_is_its_slice_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    (annotation,) = tag(tokenizer, [text])
    for entity in annotation.entities:
        assert text[entity.start : entity.end] == entity.text != ""
        assert 0 <= entity.score <= 1


@PROPERTY
@given(documents=st.lists(st.lists(WORD, min_size=1, max_size=30), min_size=1, max_size=6))
def test_words_get_a_tag_each_and_entities_are_slices_of_their_join(
    tokenizer: Tokenizer, documents: list[list[str]]
) -> None:
    for words, annotation in zip(documents, tag(tokenizer, documents), strict=True):
        if annotation.fault:
            assert annotation.tags is None
            continue
        assert annotation.tags is not None
        assert len(annotation.tags) == len(words)
        started = sum(one.startswith("B-") for one in annotation.tags)
        assert started == len(annotation.entities)
        text = " ".join(words)
        for entity in annotation.entities:
            assert text[entity.start : entity.end] == entity.text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_token_of_a_long_document_is_unseen(tokenizer: Tokenizer, layout: dict) -> None:
    text = " ".join(f"w{n}" for n in range(2000))
    engine = HashEngine(manifest(**layout))
    with tagger(tokenizer, engine) as made:
        made.tag([text])
    seen = np.concatenate([batch.input_ids[batch.segments > 0] for batch in engine.batches])
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    assert set(expected) <= set(seen.tolist())
    counted = np.bincount(seen, minlength=max(expected) + 1)
    assert (counted[: max(expected) + 1] >= np.bincount(expected)).all()


def test_one_document_that_fails_the_model_costs_that_document(tokenizer: Tokenizer) -> None:
    poison = tokenizer.token_to_id("poison")
    texts = [f"document {n} of London" for n in range(50)]
    texts[17] = "a poison pill"
    with tagger(tokenizer, HashEngine(manifest(), poison=poison)) as made:
        annotations = made.tag(texts)
    assert [n for n, a in enumerate(annotations) if a.fault] == [17]
    fault = annotations[17].fault
    assert fault is not None
    assert (fault.reason, fault.message) == ("model_failure", "poison")
    assert annotations[16] == tag(tokenizer, [texts[16]])[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_that_fails_is_run_again_in_halves(tokenizer: Tokenizer, layout: dict) -> None:
    poison = tokenizer.token_to_id("poison")
    texts = [f"document {n} of London" for n in range(64)]
    texts[5] = texts[40] = "a poison pill"
    engine = HashEngine(manifest(**{"token_budget": 1024, **layout}), poison=poison)
    with tagger(tokenizer, engine) as made:
        annotations = made.tag(texts)
    assert [n for n, a in enumerate(annotations) if a.fault] == [5, 40]
    sound = [n for n in range(64) if n not in (5, 40)]
    assert [annotations[n] for n in sound] == tag(tokenizer, [texts[n] for n in sound], **layout)


@pytest.mark.parametrize("aggregation", ["first", "average", "max", "simple", "none"])
def test_what_failed_is_not_decoded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, aggregation: str) -> None:
    """Logits that were not computed may have any value; here inf, for which softmax gives nan and a warning."""
    texts = ["met in London", "a poison pill " + "and more " * 80, "Turin"]
    empty, poison = np.empty, tokenizer.token_to_id("poison")

    def dirty(shape: Any, dtype: Any = float, **options: Any) -> NDArray[Any]:
        made = empty(shape, dtype, **options)
        if dtype is np.float32:
            made.fill(np.inf)
        return made

    monkeypatch.setattr(np, "empty", dirty)
    for documents in (texts, [text.split() for text in texts]):
        with tagger(tokenizer, HashEngine(manifest(), poison=poison)) as made:
            found = made.tag(documents, aggregation=aggregation)
            alone = [made.tag([documents[n]], aggregation=aggregation)[0] for n in (0, 2)]
        assert found[1].fault is not None
        assert (found[1].entities, found[1].tags) == ((), None)
        assert [found[0], found[2]] == alone


def test_calls_that_end_together_count_the_devices_time_once(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, calls = threading.Barrier(2), itertools.count()

    class Pair(HashEngine):
        in_flight = 2

        def run(self, batch: Batch) -> NDArray[np.float32]:
            if next(calls) < 2:
                together.wait(10)
                time.sleep(0.3)
            return super().run(batch)

    class Moment(float):
        """A time whose subtraction takes long, so that the other call ends in between."""

        def __sub__(self, other: float) -> float:
            time.sleep(0.02)
            return float(self) - other

    clock = SimpleNamespace(monotonic=lambda: Moment(time.monotonic()))
    monkeypatch.setattr("nermill.worker.tagging.clock.time", clock)
    with tagger(tokenizer, Pair(manifest(token_budget=32))) as made:
        table = shard_table([Document(str(n), text="London and Paris and Rome and Turin " * 3) for n in range(4)])
        seconds = made.pipeline.annotate(table, Options()).stats.compute_seconds
    assert 0.3 <= seconds < 0.5, "0.6 where both count all of it"


def test_the_culprit_of_a_large_batch_is_found_in_a_few_steps(tokenizer: Tokenizer) -> None:
    poison = tokenizer.token_to_id("poison")
    engine = HashEngine(manifest(token_budget=1 << 14), poison=poison)
    with tagger(tokenizer, engine) as made:
        made.tag([*["here is nothing"] * 255, "a poison pill", *["here is nothing"] * 256])
    assert len(engine.batches) < 30


class Small(HashEngine):
    """A device with memory for a limited number of tokens."""

    def run(self, batch: Batch) -> NDArray[np.float32]:
        if batch.input_ids.size > 100:
            raise EngineError("out of memory")
        return super().run(batch)


def test_a_batch_too_large_for_the_device_costs_no_document(tokenizer: Tokenizer) -> None:
    texts = [f"document {n} of London" for n in range(64)]
    with tagger(tokenizer, Small(manifest(token_budget=1024))) as made:
        assert made.tag(texts) == tag(tokenizer, texts)


def test_a_device_that_fails_for_good_blames_no_document(tokenizer: Tokenizer) -> None:
    cls = manifest().cls_id
    with (
        tagger(tokenizer, HashEngine(manifest(), poison=cls)) as made,
        pytest.raises(EngineError, match="poison"),
    ):
        made.tag(["a", "b"])


def test_the_next_batch_is_made_while_the_device_works(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    made_batches = threading.Semaphore(0)

    def build_batch_and_tell(*arguments: Any) -> Batch:
        batch = build_batch(*arguments)
        made_batches.release()
        return batch

    class Patient(HashEngine):
        def run(self, batch: Batch) -> NDArray[np.float32]:
            if len(self.batches) == 0:
                assert made_batches.acquire(timeout=10)
                assert made_batches.acquire(timeout=10), "nobody makes a second batch while the first one is computed"
            return super().run(batch)

    monkeypatch.setattr("nermill.worker.tagging.compute.build_batch", build_batch_and_tell)
    with tagger(tokenizer, Patient(manifest(token_budget=32))) as made:
        assert len(made.tag(["London and Paris and Rome"] * 20)) == 20


def test_a_thread_that_calls_the_engine_leaves_all_else_to_others(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calling: set[threading.Thread] = set()
    others: set[threading.Thread] = set()

    class Noting(HashEngine):
        def run(self, batch: Batch) -> NDArray[np.float32]:
            calling.add(threading.current_thread())
            return super().run(batch)

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            others.add(threading.current_thread())
            return function(*arguments)

        return call

    for function in (build_batch, distribute_logits):
        monkeypatch.setattr(f"nermill.worker.tagging.compute.{function.__name__}", noted(function))
    with tagger(tokenizer, Noting(manifest(token_budget=32))) as made:
        assert len(made.tag(["London and Paris and Rome"] * 40)) == 40
    assert len(calling) == 1
    assert others
    assert not calling & others


def test_a_finished_job_is_freed_while_the_device_is_idle(tokenizer: Tokenizer) -> None:
    jobs: list[weakref.ref[Job]] = []
    table = shard_table([Document("a", text="London and Paris")])
    with tagger(tokenizer, HashEngine(manifest())) as made:
        made.pipeline.annotate(table, Options(), on_fed=lambda job: jobs.append(weakref.ref(job)))
        deadline = time.monotonic() + 10
        while jobs[0]() is not None:
            assert time.monotonic() < deadline, "its logits stay in memory"
            time.sleep(0.01)


def test_an_engine_that_wants_to_end_the_process_ends_the_wait_for_it(tokenizer: Tokenizer) -> None:
    class Leaving(HashEngine):
        def run(self, batch: Batch) -> NDArray[np.float32]:
            raise SystemExit(3)

    with tagger(tokenizer, Leaving(manifest())) as made, pytest.raises(EngineError, match="SystemExit: 3"):
        made.tag(["a"])


def test_an_error_of_ours_ends_the_wait_for_the_device(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Batch:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("nermill.worker.tagging.compute.build_batch", broken)
    with tagger(tokenizer, HashEngine(manifest())) as made, pytest.raises(EngineError, match="ZeroDivisionError: ours"):
        made.tag(["a"])


def test_a_shape_costs_what_the_device_took_for_it() -> None:
    shapes = ((1, 64), (8, 64))
    lengths = np.full(8, 64)
    nothing = np.zeros(8, np.int64)
    windows = Windows(np.arange(8), nothing, lengths - SPECIAL_TOKENS, nothing, nothing)
    tokens = Tokens(*(np.zeros(size, np.int64) for size in (62, 9, 62, 62, 62)))
    for seconds, rows in [((1.0, 2.0), 8), ((0.1, 2.0), 1)]:
        pool = Pool(manifest(shapes))
        for shape, measured in zip(shapes, seconds, strict=True):
            pool.record_duration(shape, shape[0] * shape[1], measured)
        pool.put(Job(tokens, windows, np.zeros((62, 9), np.float32)))
        work = pool.take()
        assert work is not None
        assert work.placement.rows == rows


def test_a_device_that_computes_batches_at_once_is_given_as_many() -> None:
    nothing, bounds = np.zeros(62, np.int64), np.array([0, 62])
    tokens, windows = Tokens(nothing, bounds, nothing, nothing, nothing), split_into_windows(bounds, 64, 0)
    pool = Pool(manifest(layout="equal", token_budget=640), at_once=2)
    with ThreadPoolExecutor() as threads:
        for _ in range(2):  # a single window each, far from a full batch
            pool.put(Job(tokens, windows, np.zeros((62, 9), np.float32)))
            assert threads.submit(pool.take).result(10) is not None
        pool.put(Job(tokens, windows, np.zeros((62, 9), np.float32)))
        third = threads.submit(pool.take)
        with pytest.raises(TimeoutError):
            third.result(0.2)
        pool.finished()
        assert third.result(10) is not None


def test_few_windows_are_shared_out_among_idle_cores() -> None:
    nothing, bounds = np.zeros(62, np.int64), np.array([0, 62])
    tokens, windows = Tokens(nothing, bounds, nothing, nothing, nothing), split_into_windows(bounds, 64, 0)
    for layout in ("equal", "packed"):
        pool = Pool(manifest(layout=layout, token_budget=1024), at_once=4)
        for _ in range(8):
            pool.put(Job(tokens, windows, np.zeros((62, 9), np.float32)))
        rows = []
        while pool.waiting_tokens():
            work = pool.take()
            assert work is not None
            rows.append(work.placement.tokens // 64)
        assert rows == [2, 2, 2, 2], layout


def test_the_device_has_spare_capacity_until_half_a_second_of_work_waits() -> None:
    nothing, bounds = np.zeros(62, np.int64), np.array([0, 62])
    tokens, windows = Tokens(nothing, bounds, nothing, nothing, nothing), split_into_windows(bounds, 64, 0)
    for tokens_per_second, jobs in [(10, 2), (1_280, 10), (1e9, 64)]:
        pool = Pool(manifest(token_budget=64))
        pool.record_duration((1, 64), round(tokens_per_second / 10), 0.1)
        while pool.await_spare_capacity(0.01):
            pool.put(Job(tokens, windows, np.zeros((62, 9), np.float32)))
            jobs -= 1
        assert jobs == 0
        with ThreadPoolExecutor() as threads:
            woken = threads.submit(pool.await_spare_capacity, 60)
            assert pool.take() is not None
            assert woken.result()


def test_an_overlap_that_no_window_has_is_refused(tokenizer: Tokenizer) -> None:
    with tagger(tokenizer, HashEngine(manifest(shapes=((2, 64),), max_length=128))) as made:
        for overlap in (63, 64):  # 64 is the default, of which small windows use what they can
            assert len(made.tag(["Ada"], overlap=overlap)) == 1
        with pytest.raises(UsageError, match=r"^--overlap 65: windows of double have 64 tokens; name fewer$"):
            made.tag(["Ada"], overlap=65)


def test_empty_and_oversized_documents_are_named(tokenizer: Tokenizer) -> None:
    with tagger(tokenizer, HashEngine(manifest())) as made:
        empty, large, fine = made.tag(["", "x" * 101, "y"], max_chars=100)
    assert empty.fault is not None
    assert empty.fault.reason == "empty"
    assert large.fault is not None
    assert large.fault.reason == "too_large"
    assert "101" in large.fault.message
    assert fine.fault is None


def test_closing_closes_the_engine(tokenizer: Tokenizer) -> None:
    engine = HashEngine(manifest())
    with tagger(tokenizer, engine) as made:
        made.tag(["x"])
    assert engine.closed.is_set()


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ("Ada met Bob.", "str 'Ada met Bob.' in the place of a list of documents"),
        (b"Ada", "bytes b'Ada' in the place of a list of documents"),
        (None, "NoneType None in the place of a list of documents"),
        ([None], r"document 0 is None (NoneType)"),
        (["Ada", 7], "document 1 is 7 (int)"),
        ([b"Ada"], "document 0 is b'Ada' (bytes)"),
        ([["Ada", None]], "document 0 holds None (NoneType) in the place of a word"),
        ([["Ada"], "Bob"], "texts and lists of words in one call"),
        ([["Ada", ["met"]]], "document 0 holds ['met'] (list) in the place of a word"),
    ],
)
def test_what_cannot_be_tagged_is_a_type_error_that_says_what_to_pass(
    tokenizer: Tokenizer, documents: Any, message: str
) -> None:
    with tagger(tokenizer, HashEngine(manifest())) as made:
        with pytest.raises(TypeError, match=re.escape(message)) as caught:
            made.tag(documents)
        assert 'pass a list of texts, ["Ada met Bob."]' in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(made.tag(text for text in ("Ada", "Bob"))) == 2, "any iterable is fine"
        assert made.tag([]) == []


def test_labels_are_chosen_in_entities_tags_and_gold_and_counted(tokenizer: Tokenizer) -> None:
    words = [f"w{n}" for n in range(200)]
    table = shard_table([Document("a", words=tuple(words), gold_tags=("B-person", "B-X", *["O"] * 198))])
    with tagger(tokenizer, HashEngine(manifest())) as made:
        whole = made.pipeline.annotate(table, Options()).part.to_pylist()[0]
        first, *others = sorted({entity["label"] for entity in whole["entities"]})
        assert others
        options = Options(map={first: "NEW", "person": "NEW"}, only=("NEW",), min_score=0.5)
        annotated = made.pipeline.annotate(table, options)
    row = annotated.part.to_pylist()[0]
    stays = [e for e in whole["entities"] if e["label"] == first and e["score"] >= 0.5]
    assert row["entities"] == [{**entity, "label": "NEW"} for entity in stays]
    assert [tag for tag in row["tags"] if tag.startswith("B-")] == ["B-NEW"] * len(stays)
    assert row["gold_tags"] == ["B-NEW", *["O"] * 199]
    counts = json.loads(json.dumps(asdict(annotated.stats)))["labels"]
    assert counts["gold.mapped.person"] == counts["gold.left_out.X"] == 1
    assert counts[f"predicted.mapped.{first}"] == len(stays)
    assert sum(n for name, n in counts.items() if name.startswith("predicted.")) == len(whole["entities"])
    assert (annotated.stats + annotated.stats).labels == {name: 2 * n for name, n in counts.items()}
