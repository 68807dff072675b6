"""Windows of all shards that are in the worker at once, waiting for the device.

Task threads put their tokenized jobs in and wait; compute threads take batches out that mix windows of any job.
No timer delays a batch: one leaves as soon as the device is idle, and while it is busy the pool fills. Whoever takes
shards asks before whether the device will soon be idle: until then, another worker may begin them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nermill.worker.contracts.errors import EngineError
from nermill.worker.contracts.manifest import Manifest
from nermill.worker.engine import Batch
from nermill.worker.tagging.batching import Placement, Shape, cost, place, spread
from nermill.worker.tagging.windows import Tokens, Windows, concatenate

Int = NDArray[np.int64]

LEARNING_RATE = 0.1  # of the device's times, with each batch
AHEAD_SECONDS = 0.5  # of the device's work that waits for it: longer than a claim, a store and the tokenizer take
AHEAD_BATCHES = (2, 64)  # the least and the most of it


@dataclass(eq=False)
class Job:
    """One shard's windows in the pool, and what comes back for them.

    Attributes:
        tokens, windows: What to compute.
        logits: float32, shape (tokens, labels); filled window by window.
        failed: Documents that made the model fail, with its words.
        computed_tokens: The job's share of all tokens computed, padding included.
        seconds: Its share of the device's time.
        tokens_done: Tokens whose logits are there, or whose document failed.
    """

    tokens: Tokens
    windows: Windows
    logits: NDArray[np.float32]
    failed: dict[int, str] = field(default_factory=dict)
    computed_tokens: float = 0.0
    seconds: float = 0.0
    tokens_done: int = 0
    remaining: int = 0
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class Work:
    """One batch on its way: its windows, ordered by the job that they belong to, and where each one lies.

    Attributes:
        jobs: Jobs with windows in the batch.
        bounds: Where each job's windows begin, and where the last one's end; int64, shape (jobs + 1,).
        windows: The windows; their positions are those of their own job.
        placement: Where they lie, in the same order.
    """

    jobs: Sequence[Job]
    bounds: Int
    windows: Windows
    placement: Placement

    @property
    def begin(self) -> Int:
        """Position of each window's first token in the flattened batch, shape (windows,)."""
        return self.placement.row * self.placement.length + self.placement.column

    def by_job(self, counts: Int) -> Iterator[tuple[Job, slice]]:
        """Each job, and its stretch of an array that has so many entries a window."""
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])[self.bounds].tolist()
        return zip(self.jobs, map(slice, ends[:-1], ends[1:]), strict=True)


class Pool:
    """Waiting windows, oldest first.

    Args:
        manifest: Says how windows become batches.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._jobs: list[Job] = []
        self._owner = np.zeros(0, np.int64)  # of each waiting window, as a position in ``_jobs``
        self._windows = Windows(*[np.zeros(0, np.int64)] * 5)
        self._tokens = 0
        self._running = 0
        self._unfinished: set[Job] = set()
        self._closed: Exception | None = None
        self._lock = threading.Lock()
        self._spare_capacity = threading.Condition(self._lock)
        self._batch = threading.Condition(self._lock)
        self._seconds: dict[Shape, float] = {}
        self._seconds_a_token = 0.0  # of the device, padding left out

    def await_spare_capacity(self, timeout: float) -> bool:
        """Waits until the device will soon have nothing to do, or broke; False where it has enough for ``timeout``."""
        with self._lock:
            return self._spare_capacity.wait_for(self._has_spare_capacity, timeout)

    def put(self, job: Job, *, first: bool = False) -> None:
        """Adds a job's windows: behind those that wait, or before them."""
        job.remaining = len(job.windows)
        if not job.remaining:
            job.done.set()
            return
        with self._lock:
            if self._closed:
                raise self._closed
            self._unfinished.add(job)
            at = 0 if first else len(self._jobs)
            self._jobs.insert(at, job)
            owner = np.full(len(job.windows), at)
            if first:
                self._owner = np.concatenate([owner, self._owner + 1])
                self._windows = concatenate(job.windows, self._windows)
            else:
                self._owner = np.concatenate([self._owner, owner])
                self._windows = concatenate(self._windows, job.windows)
            self._tokens += int(job.windows.lengths.sum())
            self._batch.notify()

    def take(self) -> Work | None:
        """The next batch: at once where the device is idle, else when it is full; None when the pool is closed."""
        with self._lock:
            self._batch.wait_for(self._ready)
            if self._closed:
                return None
            placement = place(self._windows.lengths, self._manifest, self._cost)
            work = self._work(placement)
            kept = np.ones(len(self._windows), bool)
            kept[placement.window] = False
            self._owner, self._windows = self._owner[kept], self._windows.of(kept)
            self._forget_empty_jobs()
            self._tokens -= placement.tokens
            self._running += 1
            if self._has_spare_capacity():
                self._spare_capacity.notify_all()
            self._batch.notify()
            return work

    def learn(self, shape: Shape, tokens: int, seconds: float) -> None:
        """Takes in how long the device had a batch of that shape, with so many tokens that are not padding."""
        with self._lock:
            known = self._seconds_a_token or seconds / tokens
            self._seconds_a_token = known + LEARNING_RATE * (seconds / tokens - known)
            if shape in self._manifest.shapes:
                known = self._seconds.get(shape, seconds)
                self._seconds[shape] = known + LEARNING_RATE * (seconds - known)

    def _cost(self, shape: Shape) -> float:
        """What a shape costs here, once every compiled one was measured; until then, and of free ones, an estimate."""
        if len(self._seconds) < len(self._manifest.shapes) or not self._seconds:
            return cost(shape)
        return self._seconds[shape]

    def finished(self) -> None:
        """A batch that was taken is computed."""
        with self._lock:
            self._running -= 1
            self._unfinished = {job for job in self._unfinished if not job.done.is_set()}
            self._batch.notify()

    def close(self, error: Exception | None = None) -> None:
        """Wakes everybody, those whose windows are under way included; nothing goes in or out any more."""
        with self._lock:
            self._closed = error or EngineError("the pipeline was closed")
            for job in self._unfinished:
                if not job.done.is_set():
                    job.error = self._closed
                    job.done.set()
            self._spare_capacity.notify_all()
            self._batch.notify_all()

    def waiting_tokens(self) -> int:
        """Tokens that wait, for metrics."""
        return self._tokens

    def _has_spare_capacity(self) -> bool:
        if self._closed:
            return True
        least, most = (batches * self._manifest.batch_tokens for batches in AHEAD_BATCHES)
        has_time = self._tokens * self._seconds_a_token < AHEAD_SECONDS
        return self._tokens < (most if has_time else least)

    def _ready(self) -> bool:
        if self._closed:
            return True
        return self._tokens > 0 and (not self._running or self._tokens >= self._manifest.batch_tokens)

    def _work(self, placement: Placement) -> Work:
        placement = placement.reordered(self._owner[placement.window].argsort(kind="stable"))
        return _owned(self._jobs, self._owner[placement.window], self._windows.of(placement.window), placement)

    def _forget_empty_jobs(self) -> None:
        if not len(self._owner):
            self._jobs = []
            return
        oldest = int(self._owner[0])
        if oldest:
            self._jobs = self._jobs[oldest:]
            self._owner = self._owner - oldest


def lay_out(work: Work, manifest: Manifest) -> Batch:
    """The batch's arrays: each window as [CLS] tokens [SEP] at its place, numbered within its row."""
    placement, windows = work.placement, work.windows
    shape = (placement.rows, placement.length)
    ids = np.full(shape, manifest.pad_id, np.int64).reshape(-1)
    segments = np.zeros(shape, np.int64).reshape(-1)
    positions = np.zeros(shape, np.int64).reshape(-1)
    begin, length = work.begin, windows.lengths
    nth = spread(np.zeros_like(begin), length)  # of each token in its window
    target, source = np.repeat(begin, length) + nth, np.repeat(windows.start - 1, length) + nth
    for job, mine in work.by_job(length):
        ids[target[mine]] = job.tokens.ids.take(source[mine], mode="clip")  # the special tokens come next
    ids[begin] = manifest.cls_id
    ids[begin + length - 1] = manifest.sep_id
    segments[target] = np.repeat(_number_in_row(placement), length)
    positions[target] = nth + manifest.position_offset
    return Batch(ids.reshape(shape), segments.reshape(shape), positions.reshape(shape))


def _number_in_row(placement: Placement) -> Int:
    order = np.lexsort((placement.column, placement.row))
    row = placement.row[order]
    first_of_row = np.searchsorted(row, row)
    number = np.empty_like(row)
    number[order] = np.arange(len(row)) - first_of_row + 1
    return number


def hand_out(work: Work, logits: NDArray[np.float32], seconds: float) -> None:
    """Gives every job its tokens' logits and its share of the batch's cost.

    Args:
        work: The batch.
        logits: float32, shape (rows, length, labels).
        seconds: How long the device had it.
    """
    placement, windows = work.placement, work.windows
    count = windows.keep_end - windows.keep_start
    kept = logits.reshape(-1, logits.shape[-1])[spread(work.begin + 1 + windows.keep_start - windows.start, count)]
    target = spread(windows.keep_start, count)
    real = np.add.reduceat(windows.lengths, work.bounds[:-1])
    shares = (real / real.sum()).tolist()
    for (job, mine), share, windows_of_job in zip(
        work.by_job(count), shares, np.diff(work.bounds).tolist(), strict=True
    ):
        job.logits[target[mine]] = kept[mine]
        with job.lock:
            job.computed_tokens += share * placement.rows * placement.length
            job.seconds += share * seconds
        _settle(job, windows_of_job, mine.stop - mine.start)


def give_up(work: Work, message: str) -> None:
    """Marks the documents of a batch as those that made the model fail."""
    windows = work.windows
    kept = windows.keep_end - windows.keep_start
    for job, mine in work.by_job(np.ones(len(windows), np.int64)):
        documents = windows.document[mine].tolist()
        job.failed.update(dict.fromkeys(documents, message))
        _settle(job, len(documents), int(kept[mine].sum()))


def _settle(job: Job, windows: int, tokens: int) -> None:
    with job.lock:
        job.tokens_done += tokens
        job.remaining -= windows
        if not job.remaining:
            job.done.set()


def halves(work: Work, manifest: Manifest) -> list[Work]:
    """The batch's windows as two batches: of its shape where shapes are compiled, else of fewer rows."""
    placement = work.placement
    owner = np.repeat(np.arange(len(work.jobs)), np.diff(work.bounds))
    made = []
    for half in np.array_split(placement.row.argsort(kind="stable"), 2):
        chosen = np.sort(half)  # they stay ordered by job
        windows, row, rows = work.windows.of(chosen), placement.row[chosen], placement.rows
        if not manifest.shapes:
            row, rows = row - row.min(), int(np.ptp(row)) + 1
        tokens = int(windows.lengths.sum())
        lying = Placement(rows, placement.length, tokens, placement.window[chosen], row, placement.column[chosen])
        made.append(_owned(work.jobs, owner[chosen], windows, lying))
    return made


def _owned(jobs: Sequence[Job], owner: Int, windows: Windows, placement: Placement) -> Work:
    """Windows as work; ``owner`` is the job of each, as a position in ``jobs``, ascending."""
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    return Work([jobs[index] for index in owner[first].tolist()], np.append(first, len(owner)), windows, placement)
