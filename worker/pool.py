"""Windows of all shards that are in the worker at once, waiting for the device; the back-pressure between them.

Task threads put their tokenized jobs in and wait; compute threads take batches out that mix windows of any job.
No timer delays a batch: one leaves as soon as the device is idle, and while it is busy the pool fills.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from worker.batching import Placement, Shape, cost, place, spread
from worker.contracts.errors import EngineError
from worker.contracts.manifest import Manifest
from worker.engine import Batch
from worker.windows import SPECIAL_TOKENS, Tokens, Windows, concatenate

Int = NDArray[np.int64]

LEARNING_RATE = 0.1  # of a shape's time, with each batch


@dataclass(eq=False)
class Job:
    """One shard's windows in the pool, and what comes back for them.

    Attributes:
        tokens, windows: What to compute.
        logits: float32, shape (tokens, labels); filled window by window.
        failed: Documents that made the model fail, with its words.
        computed_tokens: The job's share of all tokens computed, padding included.
        seconds: Its share of the device's time.
    """

    tokens: Tokens
    windows: Windows
    logits: NDArray[np.float32]
    failed: dict[int, str] = field(default_factory=dict)
    computed_tokens: float = 0.0
    seconds: float = 0.0
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
        limit: Tokens that may wait before ``put`` blocks.
    """

    def __init__(self, manifest: Manifest, limit: int) -> None:
        self._manifest = manifest
        self._limit = limit
        self._jobs: list[Job] = []
        self._owner = np.zeros(0, np.int64)
        self._number = np.zeros(0, np.int64)
        self._length = np.zeros(0, np.int64)
        self._tokens = 0
        self._running = 0
        self._unfinished: set[Job] = set()
        self._closed: Exception | None = None
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._batch = threading.Condition(self._lock)
        self._seconds: dict[Shape, float] = {}

    def put(self, job: Job) -> None:
        """Adds a job's windows; waits while the pool is over its limit."""
        lengths = job.windows.lengths
        job.remaining = len(lengths)
        if not job.remaining:
            job.done.set()
            return
        with self._lock:
            self._room.wait_for(lambda: self._closed or self._tokens <= self._limit)
            if self._closed:
                raise self._closed
            self._unfinished.add(job)
            self._jobs.append(job)
            self._owner = np.append(self._owner, np.full(len(lengths), len(self._jobs) - 1))
            self._number = np.append(self._number, np.arange(len(lengths)))
            self._length = np.append(self._length, lengths)
            self._tokens += int(lengths.sum())
            self._batch.notify()

    def take(self) -> Work | None:
        """The next batch: at once where the device is idle, else when it is full; None when the pool is closed."""
        with self._lock:
            self._batch.wait_for(self._ready)
            if self._closed:
                return None
            placement = place(self._length, self._manifest, self._cost)
            work = self._work(placement)
            kept = np.ones(len(self._length), bool)
            kept[placement.window] = False
            self._owner, self._number, self._length = self._owner[kept], self._number[kept], self._length[kept]
            self._forget_empty_jobs()
            self._tokens -= int(work.windows.lengths.sum())
            self._running += 1
            self._room.notify_all()
            self._batch.notify()
            return work

    def learn(self, shape: Shape, seconds: float) -> None:
        """Takes in how long the device had a batch of a compiled shape."""
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
            self._room.notify_all()
            self._batch.notify_all()

    def waiting_tokens(self) -> int:
        """Tokens that wait, for metrics."""
        return self._tokens

    def _ready(self) -> bool:
        if self._closed:
            return True
        return self._tokens > 0 and (not self._running or self._tokens >= self._manifest.batch_tokens)

    def _work(self, placement: Placement) -> Work:
        owner = self._owner[placement.window]
        by_owner = np.argsort(owner, kind="stable")
        placement = placement.of(by_owner)
        owners, first = np.unique(owner[by_owner], return_index=True)
        jobs = [self._jobs[index] for index in owners.tolist()]
        number = np.split(self._number[placement.window], first[1:])
        windows = concatenate([job.windows.of(mine) for job, mine in zip(jobs, number, strict=True)])
        return Work(jobs, np.append(first, len(owner)), windows, placement)

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
    content = length - SPECIAL_TOKENS
    source, target = spread(windows.start, content), spread(begin + 1, content)
    for job, mine in work.by_job(content):
        ids[target[mine]] = job.tokens.ids[source[mine]]
    ids[begin] = manifest.cls_id
    ids[begin + content + 1] = manifest.sep_id
    everywhere = spread(begin, length)
    segments[everywhere] = np.repeat(_number_in_row(placement), length)
    positions[everywhere] = spread(np.full_like(begin, manifest.position_offset), length)
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
        _settle(job, windows_of_job)


def give_up(work: Work, message: str) -> None:
    """Marks the documents of a batch as those that made the model fail."""
    for job, mine in work.by_job(np.ones(len(work.windows), np.int64)):
        documents = work.windows.document[mine].tolist()
        job.failed.update(dict.fromkeys(documents, message))
        _settle(job, len(documents))


def _settle(job: Job, windows: int) -> None:
    with job.lock:
        job.remaining -= windows
        if not job.remaining:
            job.done.set()


def alone(work: Work) -> Iterator[Work]:
    """The batch's windows one by one, each in the shape that the batch had."""
    first = np.zeros(1, np.int64)
    place = Placement(work.placement.rows, work.placement.length, first, first, first)
    for job, mine in work.by_job(np.ones(len(work.windows), np.int64)):
        for number in range(mine.start, mine.stop):
            yield Work([job], np.array([0, 1]), work.windows.of(np.array([number])), place)
