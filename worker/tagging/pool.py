"""The pool of windows that wait for the device, of all shards that the process has begun.

Task threads add tokenized jobs and wait for them. The threads of ``compute`` take batches, which mix windows of any
job. A batch is taken at once while the device can compute another, and when it is full while the device is busy; there
is no timer. The queue's consumer asks ``await_spare_capacity`` before it takes a shard, so that shards are left to idle
workers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from nermill.worker.contracts.errors import EngineError
from nermill.worker.contracts.manifest import Manifest
from nermill.worker.engine import Batch
from nermill.worker.tagging.batching import CPU_MIN_TOKENS, Placement, Shape, cost, place, spread
from nermill.worker.tagging.tokens import Tokens
from nermill.worker.tagging.windows import Windows, concatenate

Int = NDArray[np.int64]

SMOOTHING = 0.1  # weight of the newest batch, where it is full, in the moving averages of the device's times
AHEAD_SECONDS = 0.5  # device time of the windows that should wait; leasing, reading and tokenizing a shard take less
AHEAD_BATCHES = (2, 64)  # bounds of the same, in batches for each that the device computes at the same time


@dataclass(eq=False)
class Job:
    """One shard in the pool, and its results.

    Attributes:
        tokens, windows: What is to be computed.
        logits: float32, shape (tokens, labels); filled window by window.
        failed: Error message of each document on which the model failed.
        computed_tokens: The job's share of the tokens computed, padding included.
        seconds: The job's share of the device's time.
        tokens_done: Tokens that are computed, or on whose document the model failed.
        remaining: Windows that are not computed yet.
        error: Why the job ended without results, if it did.
        done: Set when the job has ended.
        lock: Guards ``computed_tokens``, ``seconds``, ``tokens_done`` and ``remaining``.
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
    """One batch that is to be computed: its windows, ordered by job, and their positions in the batch.

    Attributes:
        jobs: Jobs with windows in the batch.
        bounds: First window of each job, and the number of windows; int64, shape (jobs + 1,).
        windows: The windows; token positions are those of the window's own job.
        placement: Positions of the windows in the batch, in the same order.
    """

    jobs: Sequence[Job]
    bounds: Int
    windows: Windows
    placement: Placement

    @property
    def begin(self) -> Int:
        """Position of each window's first token in the flattened batch, int64, shape (windows,)."""
        return self.placement.row * self.placement.length + self.placement.column

    def by_job(self, counts: Int) -> Iterator[tuple[Job, slice]]:
        """Each job, and its slice of an array that holds several entries for each window.

        Args:
            counts: Entries of each window; int64, shape (windows,).
        """
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])[self.bounds].tolist()
        return zip(self.jobs, map(slice, ends[:-1], ends[1:]), strict=True)


class Pool:
    """The waiting windows, oldest first.

    Args:
        manifest: Shapes, layout and token budget of batches.
        at_once: How many batches the device computes at the same time.
    """

    def __init__(self, manifest: Manifest, at_once: int = 1) -> None:
        self._manifest = manifest
        self._at_once = at_once
        self._jobs: list[Job] = []
        self._owner = np.zeros(0, np.int64)  # job of each waiting window, as an index into ``_jobs``
        self._windows = Windows(*[np.zeros(0, np.int64)] * 5)
        self._tokens = 0
        self._running = 0
        self._unfinished: set[Job] = set()
        self._closed: Exception | None = None
        self._lock = threading.Lock()
        self._spare_capacity = threading.Condition(self._lock)
        self._batch = threading.Condition(self._lock)
        self._seconds: dict[Shape, float] = {}
        self._seconds_a_token = 0.0  # device time for each token that is not padding

    def await_spare_capacity(self, timeout: float) -> bool:
        """Waits until the device will soon be idle, or the pool is closed.

        Args:
            timeout: Most seconds to wait.

        Returns:
            False where enough windows still wait after ``timeout``.
        """
        with self._lock:
            return self._spare_capacity.wait_for(self._has_spare_capacity, timeout)

    def put(self, job: Job, *, first: bool = False) -> None:
        """Adds a job's windows.

        Args:
            job: The job; one without windows is done at once.
            first: Whether its windows go before those that wait, or behind them.

        Raises:
            EngineError: the pool is closed.
        """
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
        """Waits for the next batch and takes it out; None when the pool is closed.

        A batch is due at once where fewer are being computed than the device computes at the same time, else when a
        full one waits.
        """
        with self._lock:
            self._batch.wait_for(self._is_batch_due)
            if self._closed:
                return None
            placement = place(self._windows.lengths, self._shared_out(), self._cost)
            work = self._work(placement)
            kept = np.ones(len(self._windows), bool)
            kept[placement.window] = False
            self._owner, self._windows = self._owner[kept], self._windows.of(kept)
            self._drop_finished_jobs()
            self._tokens -= placement.tokens
            self._running += 1
            if self._has_spare_capacity():
                self._spare_capacity.notify_all()
            self._batch.notify()
            return work

    def record_duration(self, shape: Shape, tokens: int, seconds: float) -> None:
        """Updates the averages of the device's times.

        Args:
            shape: (rows, length) of a batch that was computed.
            tokens: Its tokens that are not padding.
            seconds: Time that the device took.
        """
        with self._lock:
            known = self._seconds_a_token or seconds / tokens
            weight = SMOOTHING * min(1.0, tokens / self._manifest.batch_tokens)
            self._seconds_a_token = known + weight * (seconds / tokens - known)
            if shape in self._manifest.shapes:
                known = self._seconds.get(shape, seconds)
                self._seconds[shape] = known + SMOOTHING * (seconds - known)

    def _shared_out(self) -> Manifest:
        """The manifest, with smaller batches where so few windows wait that full ones would leave the device idle."""
        idle = self._at_once - self._running
        share = max(CPU_MIN_TOKENS, -(-self._tokens // max(1, idle)))
        if self._manifest.shapes or idle < 2 or share >= self._manifest.token_budget:
            return self._manifest
        return replace(self._manifest, token_budget=share)

    def _cost(self, shape: Shape) -> float:
        """Seconds of a compiled shape once all have been measured; until then, and for free shapes, an estimate."""
        if len(self._seconds) < len(self._manifest.shapes) or not self._seconds:
            return cost(shape)
        return self._seconds[shape]

    def finished(self) -> None:
        """Notes that a batch that was taken has been computed."""
        with self._lock:
            self._running -= 1
            self._unfinished = {job for job in self._unfinished if not job.done.is_set()}
            self._batch.notify()

    def close(self, error: Exception | None = None) -> None:
        """Ends all unfinished jobs with an error and wakes all threads; nothing is added or taken afterwards.

        Args:
            error: Error of the jobs; None for one that says that the pipeline was closed.
        """
        with self._lock:
            self._closed = error or EngineError("the pipeline was closed")
            for job in self._unfinished:
                if not job.done.is_set():
                    job.error = self._closed
                    job.done.set()
            self._spare_capacity.notify_all()
            self._batch.notify_all()

    def waiting_tokens(self) -> int:
        """Number of tokens that wait, for metrics."""
        return self._tokens

    def _has_spare_capacity(self) -> bool:
        if self._closed:
            return True
        least, most = (batches * self._at_once * self._manifest.batch_tokens for batches in AHEAD_BATCHES)
        has_time = self._tokens * self._seconds_a_token < AHEAD_SECONDS
        return self._tokens < (most if has_time else least)

    def _is_batch_due(self) -> bool:
        if self._closed:
            return True
        return self._tokens > 0 and (self._running < self._at_once or self._tokens >= self._manifest.batch_tokens)

    def _work(self, placement: Placement) -> Work:
        placement = placement.reordered(self._owner[placement.window].argsort(kind="stable"))
        return _group_by_job(self._jobs, self._owner[placement.window], self._windows.of(placement.window), placement)

    def _drop_finished_jobs(self) -> None:
        if not len(self._owner):
            self._jobs = []
            return
        oldest = int(self._owner[0])
        if oldest:
            self._jobs = self._jobs[oldest:]
            self._owner = self._owner - oldest


def build_batch(work: Work, manifest: Manifest) -> Batch:
    """The arrays of a batch: each window as ``[CLS] tokens [SEP]`` at its position; see ``engine.Batch``."""
    placement, windows = work.placement, work.windows
    shape = (placement.rows, placement.length)
    ids = np.full(shape, manifest.pad_id, np.int64).reshape(-1)
    segments = np.zeros(shape, np.int64).reshape(-1)
    positions = np.zeros(shape, np.int64).reshape(-1)
    begin, length = work.begin, windows.lengths
    nth = spread(np.zeros_like(begin), length)  # of each token in its window
    target, source = np.repeat(begin, length) + nth, np.repeat(windows.start - 1, length) + nth
    for job, mine in work.by_job(length):
        ids[target[mine]] = job.tokens.ids.take(source[mine], mode="clip")  # the two below overwrite both ends
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


def distribute_logits(work: Work, logits: NDArray[np.float32], seconds: float) -> None:
    """Copies a batch's logits to its jobs and adds each job's share of the tokens and the time.

    Args:
        work: The batch.
        logits: float32, shape (rows, length, labels).
        seconds: Time that the device took.
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
        _count_done(job, windows_of_job, mine.stop - mine.start)


def mark_failed(work: Work, message: str) -> None:
    """Records that the model failed on the documents of a batch.

    Args:
        work: The batch.
        message: The model's error.
    """
    windows = work.windows
    kept = windows.keep_end - windows.keep_start
    for job, mine in work.by_job(np.ones(len(windows), np.int64)):
        documents = windows.document[mine].tolist()
        job.failed.update(dict.fromkeys(documents, message))
        _count_done(job, len(documents), int(kept[mine].sum()))


def _count_done(job: Job, windows: int, tokens: int) -> None:
    with job.lock:
        job.tokens_done += tokens
        job.remaining -= windows
        if not job.remaining:
            job.done.set()


def split_work(work: Work, manifest: Manifest) -> list[Work]:
    """Splits a batch in two by rows; the halves have the batch's shape where shapes are compiled, else fewer rows."""
    placement = work.placement
    owner = np.repeat(np.arange(len(work.jobs)), np.diff(work.bounds))
    made = []
    for half in np.array_split(placement.row.argsort(kind="stable"), 2):
        chosen = np.sort(half)  # they stay ordered by job
        windows, row, rows = work.windows.of(chosen), placement.row[chosen], placement.rows
        if not manifest.shapes:
            row, rows = row - row.min(), int(np.ptp(row)) + 1
        tokens = int(windows.lengths.sum())
        half_placement = Placement(
            rows, placement.length, tokens, placement.window[chosen], row, placement.column[chosen]
        )
        made.append(_group_by_job(work.jobs, owner[chosen], windows, half_placement))
    return made


def _group_by_job(jobs: Sequence[Job], owner: Int, windows: Windows, placement: Placement) -> Work:
    """A batch of windows that are ordered by job.

    Args:
        jobs: The jobs.
        owner: Job of each window, as an index into ``jobs``, ascending; int64, shape (windows,).
        windows, placement: The windows and their positions.
    """
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    return Work([jobs[index] for index in owner[first].tolist()], np.append(first, len(owner)), windows, placement)
