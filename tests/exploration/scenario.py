"""What is explored: the product's own worker and producer in a simulated world."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import ipc
from redis.exceptions import ConnectionError as RedisConnectionError

from nermill.producer.runs import base_stream, by_value, compact, planning, recovery, run, status, stream_by_value
from nermill.producer.runs import queue as producer_queue
from nermill.producer.runs import shards as producer_shards
from nermill.producer.runs.base_stream import BaseStream
from nermill.producer.runs.by_value import open_seen_or_not
from nermill.producer.runs.continuation import find_followed, followed_run_id
from nermill.producer.runs.planning import Found, Request, make_plan
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.run import resume, wait
from nermill.producer.runs.shards import ShardLimits
from nermill.producer.runs.stream import Stream
from nermill.producer.runs.stream_by_value import StreamByValue
from nermill.producer.sources.live import Position
from nermill.worker.contracts import layout, ledger, part, shard, store
from nermill.worker.contracts.dispatch import Dispatcher
from nermill.worker.contracts.document import Document, Fault
from nermill.worker.contracts.errors import MessageError, NermillError, UsageError
from nermill.worker.contracts.layout import REPORT_JSON, RunFolder
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.message import FINISH_RUN, KEY_PREFIX, QUEUE
from nermill.worker.contracts.plan import Options, Plan, read_plan
from nermill.worker.contracts.schema import part_schema
from nermill.worker.evaluation import report
from nermill.worker.process.metrics import Metrics
from nermill.worker.process.settings import Settings
from nermill.worker.queue import capacity, finish, leases, poison, shards, watchdog
from nermill.worker.queue.capacity import Capacity
from nermill.worker.queue.leases import Leases
from nermill.worker.queue.poison import Isolation
from nermill.worker.queue.shards import ShardWorker
from nermill.worker.queue.watchdog import Watchdog
from nermill.worker.tagging import parts
from nermill.worker.tagging.clock import DeviceClock
from nermill.worker.tagging.pipeline import Annotated, Stats
from tests.exploration import world as simulated
from tests.exploration.invariants import Watch
from tests.exploration.places import Bucket
from tests.exploration.server import Server
from tests.exploration.state import digest
from tests.exploration.world import MAX_POSITIONS, Actor, Process, World

LEASE = 12.0
NEVER = 1e6  # seconds: a shard leaves when it is full
POISON = "poison"  # a document of that text ends the process that tags it
ARTIFACT = "a" * 64
READS = ("load", "workers", "waiting")  # steps of the ledger that change nothing


@dataclass(frozen=True)
class Scenario:
    """What there is to do, and by whom.

    Attributes:
        documents: Texts; two make a shard.
        seconds: How long tagging of each shard takes.
        out: Where runs go: on the disk or in the store.
        workers: Worker processes.
        concurrency: Shards that each may hold.
        waits: Whether the producer follows the run to its end; one that does not cannot mend the loss of the broker.
        blind: Workers on hosts without the disk.
        restart: Seconds until the supervisor starts a worker again.
        operator: Seconds until somebody gives a command again that failed or was killed.
        pause: Seconds for which a process or thread does nothing: more than a lease.
        compacts: Whether the run is compacted when it is complete.
        cancels: Seconds after which somebody cancels the run; 0 where nobody does.
        polls: Seconds between the first two looks of a producer that waits, and between later ones at most.
        has_gold: Whether the documents have gold tags, so that the run is evaluated.
        by_value: Whether the documents go through the broker; the producer then does not see the disk.
        is_stream: Whether the producer follows a file that grows, and is given the same command again.
    """

    name: str
    documents: tuple[str, ...] = ("a", "b", "c", "d")
    seconds: tuple[float, ...] = (1.0, 1.0)
    out: str = "/out"
    workers: int = 2
    shard_documents: int = 2
    concurrency: int = 1
    waits: bool = True
    blind: tuple[str, ...] = ()
    restart: float = 2.0
    operator: float = 30.0
    pause: float = 2 * LEASE + 1
    polls: tuple[float, float] = (1.0, 9.0)
    compacts: bool = False
    cancels: float = 0.0
    has_gold: bool = True
    by_value: bool = False
    is_stream: bool = False

    @property
    def is_disk(self) -> bool:
        return "://" not in self.out

    @property
    def shards(self) -> int:
        return -(-len(self.documents) // self.shard_documents)


# All times are whole periods of a worker's renewals, so much comes to the same: two faults can be tried everywhere.
_IN_STEP: dict[str, Any] = {"restart": 4.0, "operator": 8.0, "pause": 20.0, "polls": (4.0, 4.0)}
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("disk", **_IN_STEP),
        Scenario("store", out="sim://bucket/out", seconds=(5.0, 5.0), **_IN_STEP),
        Scenario("slow", seconds=(15.0, 15.0), has_gold=False),
        Scenario("queue", documents=tuple("abcdefgh"), seconds=(6.0,) * 8, shard_documents=1),
        Scenario("poison", documents=(POISON, "b", "c", "d")),
        Scenario("alone", waits=False, **_IN_STEP),
        Scenario("blind", waits=False, blind=("w0",)),
        Scenario("compact", out="sim://bucket/out", restart=4.0, operator=8.0, pause=40.0, compacts=True),
        Scenario("cancel", seconds=(2.0,) * 4, shard_documents=1, cancels=1.0, **_IN_STEP),
        Scenario("value", by_value=True, **_IN_STEP),
        Scenario("stream", is_stream=True, has_gold=False, **_IN_STEP),
        Scenario("stream-value", is_stream=True, by_value=True, has_gold=False, **_IN_STEP),
        Scenario("threads", workers=1, concurrency=2, documents=("a", "b", "c"), seconds=(1.0,) * 3, shard_documents=1),
    )
}


# Arguments in the name of a step: none that differs where it comes later.
_TOLD = {"register": 1, "close": 2, "unable": 2}
_SHARED: dict[tuple[int, float], int] = {}
_CONSTANT = frozenset(("pipeline", "metrics", "identity", "queues", "ledger", "_ledger", "_documents", "_dispatcher"))
_CONSTANT_OF_STREAM = frozenset(("_queue", "_limits", "_on_shard", "_threads", "run"))
_TOLD_ELSEWHERE = frozenset(("_settings", "_lock", "_received"))


class _Client:
    """The ledger's Redis client: each call is a step."""

    def __init__(self, world: World) -> None:
        self._world = world

    def _step(self, label: str, effect: Callable[[], Any], *, writes: bool = False) -> Any:
        return self._world.step(f"ledger.{label}", effect, writes=writes, failure=_unreachable)

    def register_script(self, source: str) -> Callable[..., Any]:
        program = _program(self._world.server, source)

        def call(keys: list[str], args: list[Any]) -> Any:
            about = " ".join(str(argument)[:12] for argument in args[1 : _TOLD.get(args[0], 3)])

            def effect() -> Any:
                told = program(keys, args)
                self._world.watch.stepped(args, told)
                return told

            return self._step(f"{args[0]} {about}", effect, writes=args[0] not in READS)

        return call

    def hgetall(self, name: str) -> dict[str, str]:
        return dict(self._step("hgetall", lambda: self._world.server.hgetall(name)))

    def hkeys(self, name: str) -> list[str]:
        return list(self._step("hkeys", lambda: self._world.server.hkeys(name)))

    def zrange(self, name: str, first: int, last: int) -> list[str]:
        return list(self._step("zrange", lambda: self._world.server.zrange(name, str(first), str(last))))

    def info(self, section: str) -> dict[str, Any]:
        return dict(self._step(f"info {section}", dict))

    def hget(self, name: str, key: str) -> str | None:
        found: str | None = self._step("hget", lambda: self._world.server.hget(name, key))
        return found

    def hvals(self, name: str) -> list[str]:
        return list(self._world.step("", lambda: self._world.server.hvals(name)))

    def hlen(self, name: str) -> int:
        return int(self._world.step("", lambda: self._world.server.hlen(name)))  # with the hgetall before it

    def zcard(self, name: str) -> int:
        return int(self._world.step("", lambda: self._world.server.zcard(name)))

    def get(self, name: str) -> str | None:
        found: str | None = self._step("get", lambda: self._world.server.get(name))
        return found

    def pttl(self, name: str) -> int:
        return int(self._step("pttl", lambda: self._world.server.pttl(name)))

    def pexpire(self, name: str, milliseconds: int) -> int:
        server = self._world.server

        def effect() -> int:
            return server.remembered(("pexpire", name, milliseconds), lambda: server.pexpire(name, milliseconds))

        return int(self._step("pexpire", effect, writes=True))

    def delete(self, name: str) -> int:
        server = self._world.server
        return int(
            self._step("delete", lambda: server.remembered(("delete", name), lambda: server.delete(name)), writes=True)
        )

    def smembers(self, name: str) -> list[str]:
        return list(self._step("smembers", lambda: self._world.server.smembers(name)))

    def set(self, name: str, value: object, *, nx: bool, px: int) -> bool:
        label = name.removeprefix(KEY_PREFIX).partition(":")[0]

        def effect() -> bool:
            server = self._world.server
            is_set = server.remembered(("set", name, value, px), lambda: server.set(name, str(value), nx=nx, px=px))
            if is_set and label == "recovery":
                self._world.watch.looks()
            return is_set

        return bool(self._step(f"set {label}", effect, writes=True))


def _unreachable() -> Exception:
    return RedisConnectionError("Connection reset by peer")


_programs: dict[str, Any] = {}


def _program(server: Server, source: str) -> Any:
    """The script, translated once for all worlds."""
    if source not in _programs:
        _programs[source] = Server.script(source)
    program = _programs[source]

    def call(keys: list[str], arguments: list[Any]) -> Any:
        return server.remembered(("script", *arguments), lambda: program(server, keys, arguments))

    return call


class _AbsentError(Exception):
    """Redis has no such list."""


class _Celery:
    """The three calls that the dispatcher makes of a Celery application."""

    def __init__(self, world: World) -> None:
        self._world = world

    @contextmanager
    def connection_or_acquire(self) -> Iterator[Any]:
        def declare(queue: str, passive: bool) -> Any:
            assert passive
            depth = self._world.step(f"queue.depth {queue[:8]}", lambda: self._world.depth(queue), failure=_unreachable)
            if not depth:
                raise _AbsentError
            return SimpleNamespace(message_count=depth)

        yield SimpleNamespace(default_channel=SimpleNamespace(queue_declare=declare), channel_errors=(_AbsentError,))

    @contextmanager
    def producer_or_acquire(self) -> Iterator[None]:
        yield None

    def send_task(self, name: str, args: tuple[Any, ...], queue: str, priority: int, **_: Any) -> None:
        message = (name, *args)
        label = f"queue.send {simulated.named((name, *args[2:])) or 'finish'}"
        self._world.watch.sent += 1
        self._world.step(label, lambda: self._world.send(queue, priority, message), writes=True, failure=_unreachable)


class _Settings(Settings):
    @property
    def worker_name(self) -> str:
        return self.model  # as no worker of the world asks for its model by name


class _Pipeline:
    """A model that takes its time, and that one text kills."""

    manifest = SimpleNamespace(name="model", sha256=ARTIFACT)
    broken = None
    clock = DeviceClock()

    def __init__(self, world: World, scenario: Scenario, process: Process) -> None:
        self._world, self._scenario, self._process = world, scenario, process

    def await_spare_capacity(self, timeout: float) -> bool:
        return True

    def annotate(
        self, table: pa.Table, options: Options, first: int = 0, on_fed: Callable[[Any], object] = lambda job: None
    ) -> Annotated:
        self._world.watch.annotates(self._process, first, table.num_rows)
        attempt = self._world.watch.attempt(self._process, first)
        self._world.tell(attempt)
        texts = tuple(
            zip(table["doc_id"].to_pylist(), table["text"].to_pylist(), table["fault_reason"].to_pylist(), strict=True)
        )
        on_fed(SimpleNamespace(tokens_done=0, tokens=SimpleNamespace(ids=())))
        self._world.sleep(self._scenario.seconds[first // self._scenario.shard_documents])
        self._world.watch.annotated(self._process)
        if any(text == POISON and fault is None for _, text, fault in texts):
            self._world.watch.poison()
            self._world.die()
        return _annotated(texts, first, attempt)


@cache
def _annotated(texts: tuple[tuple[str, str, str | None], ...], first: int, computed: int) -> Annotated:
    rows = [
        {
            "doc_index": first + at,
            "doc_id": name,
            "n_chars": len(text or ""),
            "n_tokens": 1,
            "n_windows": 1,
            "status": "rejected" if fault else "ok",
            "entities": [],
            "words": None,
            "tags": None,
            "gold_tags": None,
            "reject_reason": fault,
            "reject_message": fault and "why",
        }
        for at, (name, text, fault) in enumerate(texts)
    ]
    faults = {at: Fault(fault, "why") for at, (_, _, fault) in enumerate(texts) if fault}  # type: ignore[arg-type]
    schema = part_schema(keep_text=False, keep_fields=False)
    size = len(texts)
    return Annotated(
        pa.Table.from_pylist(rows, schema=schema), faults, Stats(size, size, computed, 0.0, 0.0, 0.0, 0.0, {})
    )


class _MemoryDisk(store.Disk):
    """The product's disk, whose files pyarrow cannot open by their path."""

    def source(self, path: str) -> Any:
        return io.BytesIO(World.current.disk.read(path))


class _Facade:
    """The ``os``, ``open`` or ``shutil`` of the disk of the current world."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(World.current.disk, self._name), name)


def _open_store(uri: str) -> tuple[Any, str]:
    found, path = store.open_store(uri)
    return (_MemoryDisk() if type(found) is store.Disk else found), path


def _evaluate(uri: str) -> str:
    World.current.watch.evaluated()
    report.write_report(RunFolder(uri), {})
    return ""


class _Parquet:
    """``pyarrow.parquet`` for readers of parts, which remembers what a file's bytes say."""

    ParquetWriter = pq.ParquetWriter

    def __init__(self) -> None:
        self._known: dict[bytes, _File] = {}

    def ParquetFile(self, source: io.BytesIO, pre_buffer: bool) -> _File:  # noqa: N802
        data = source.getvalue()
        if data not in self._known:
            self._known[data] = _File(pq.ParquetFile(io.BytesIO(data), pre_buffer=pre_buffer))
        return self._known[data]


class _File:
    def __init__(self, file: pq.ParquetFile) -> None:
        self._file = file
        self.schema_arrow, self.metadata = file.schema_arrow, file.metadata
        self._tables: dict[str, pa.Table] = {}

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None: ...

    def read(self, columns: list[str] | None, use_threads: bool) -> pa.Table:
        if str(columns) not in self._tables:
            self._tables[str(columns)] = self._file.read(columns, use_threads=False)
        return self._tables[str(columns)]


class _Ipc:
    """``pyarrow.ipc`` for readers and writers of shards, which remembers what a file's bytes say."""

    IpcWriteOptions, new_file = ipc.IpcWriteOptions, staticmethod(ipc.new_file)

    def __init__(self) -> None:
        self._known: dict[bytes, pa.Table] = {}

    def open_file(self, reader: pa.BufferReader) -> Any:
        data = reader.read()
        if data not in self._known:
            self._known[data] = ipc.open_file(pa.BufferReader(data)).read_all()
        return SimpleNamespace(read_all=lambda: self._known[data])


def _remembered(call: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
    """A function without effects, called once for each key."""
    known: dict[Any, Any] = {}

    def remembering(*arguments: Any) -> Any:
        name = key(*arguments)
        if name not in known:
            known[name] = call(*arguments)
        return known[name]

    return remembering


def _of_shard(table: pa.Table) -> str:
    return str(table.select(["doc_id", "text"]).to_pylist()) + str(table.schema.metadata)


def _of_part(table: pa.Table, metadata: dict[str, str]) -> tuple[str, ...]:
    columns = (str(table[name].to_pylist()) for name in ("doc_index", "doc_id", "reject_reason"))
    return (*columns, str(metadata))  # with the attempt's own count of tokens


@cache
def install() -> None:
    """Puts the world in the place of the modules through which the product reaches the outside."""
    logging.disable(logging.CRITICAL)
    World.opaque = (World, Watch, Mill, Actor, Process, Scenario, Ledger, Dispatcher, Queue, ShardWorker, RunFolder)
    World.opaque += (
        Stream,
        StreamByValue,
        _Pipeline,
        _Client,
        _Settings,
        Metrics,
        Leases,
        Capacity,
        Watchdog,
        Isolation,
    )
    fsspec.register_implementation("sim", Bucket, clobber=True)
    producer = by_value, run, producer_queue, status, planning, base_stream, stream_by_value
    for module in (ledger, shards, capacity, layout, *producer):
        module.time = simulated.clock  # type: ignore[attr-defined]
    for module in (ledger, store, compact, base_stream):
        module.uuid = simulated.identifiers  # type: ignore[attr-defined]
    for module in (store, layout, recovery, planning, compact):
        module.os = _Facade("os")  # type: ignore[attr-defined]
    for module in (recovery, planning, compact):
        module.shutil = _Facade("shutil")  # type: ignore[attr-defined]
    store.open = lambda path, mode: World.current.disk.open(path, mode)  # type: ignore[attr-defined]
    store.deadline = SimpleNamespace(SECONDS=1.0, within=lambda seconds, call: call())  # type: ignore[attr-defined]
    leases.within = lambda seconds, call: call()  # type: ignore[assignment]
    finish.evaluate_apart = _evaluate
    report.render_report = lambda scores: ""  # type: ignore[assignment]
    watchdog.os = SimpleNamespace(_exit=lambda code: World.current.die())  # type: ignore[attr-defined]
    shards.is_allowed = lambda uri, roots: True  # type: ignore[assignment]  # which follows links on a real disk
    poison.threading = base_stream.threading = simulated.threading  # type: ignore[attr-defined,assignment]
    layout.open_store = _open_store
    part.ThreadPoolExecutor = status.ThreadPoolExecutor = simulated.pool  # type: ignore[attr-defined,misc]
    part.pq = _Parquet()  # type: ignore[assignment]
    shard.ipc = _Ipc()  # type: ignore[assignment]
    producer_shards.encode_shard = _remembered(shard.encode_shard, _of_shard)
    parts._parquet = _remembered(parts._parquet, _of_part)


class Mill:
    """A scenario at work: its processes, and what restarts them."""

    def __init__(self, world: World, scenario: Scenario) -> None:
        self.world, self.scenario = world, scenario
        run._POLL_SECONDS = scenario.polls
        base_stream.LOOK_SECONDS = scenario.polls[0]
        self.commands = {"producer": self._produce, "canceller": self._cancel}
        self.ended: set[str] = set()  # commands that ended without an error
        self.run_uri = ""
        self._metrics = _metrics()
        world.deliver, world.is_over = self._deliver, self._is_over
        world.at_death = self._died
        world.shared, world.memory = self._shared, self._memory
        world.may_drop = scenario.waits
        world.blind = (*scenario.blind, "producer") if scenario.by_value else scenario.blind
        self.watch = Watch(world, scenario)
        for number in range(scenario.workers):
            self._start_worker(f"w{number}")
        self._start_command("producer")
        if scenario.cancels:
            self._start_command_later("canceller", scenario.cancels)

    def _died(self, process: Process) -> None:
        if process.slot in self.commands:
            if process.slot not in self.ended:
                self._start_command_later(process.slot, self.scenario.operator)
        else:
            self.world.later(self.scenario.restart, process.slot, lambda: self._start_worker(process.slot))

    def _shared(self, process: Process) -> int:
        """A hash of what the threads of a process have in common."""
        worker = process.extra
        if worker is None:
            return 0
        if isinstance(worker, BaseStream):
            own = {name: value for name, value in vars(worker).items() if name not in _CONSTANT_OF_STREAM}
            return digest(own, self.world)
        key = process.memory, self.world.now
        if key not in _SHARED:
            if len(_SHARED) > MAX_POSITIONS:
                _SHARED.clear()
            parts = worker, worker.leases, worker.capacity, worker.watchdog, worker.isolation
            told = [
                {name: value for name, value in vars(part).items() if name not in _CONSTANT | _TOLD_ELSEWHERE}
                for part in parts
            ]
            _SHARED[key] = digest(told, self.world)
        return _SHARED[key]

    def _memory(self) -> object:
        received = [
            [
                since
                for since in process.extra.capacity._received.values()
                if since > self.world.now - capacity.RECEIVED_SECONDS
            ]
            for process in self._workers()
        ]
        return sorted(self.ended), received, self.watch.memory()

    # Workers

    def _start_worker(self, slot: str) -> None:
        world = self.world
        process = world.begin(slot)
        book = Ledger(_Client(world))
        settings = _Settings(model=process.name, lease_seconds=LEASE, concurrency=self.scenario.concurrency)
        worker = ShardWorker(
            _Pipeline(world, self.scenario, process),  # type: ignore[arg-type]
            book,
            Dispatcher(_Celery(world), book),
            settings,
            self._metrics,
        )
        worker.leases.stopping = simulated.event()  # type: ignore[assignment]
        process.extra = worker
        world.act(
            "keep",
            process,
            lambda: worker.leases.keep(simulated.event(), self._metrics, worker.watchdog.note_defect),  # type: ignore[arg-type]
            self._worker_ended,
        )

    def _worker_ended(self, result: Any, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, (RedisConnectionError, OSError, MessageError)):
            self.world.violated(f"a worker raised {type(error).__name__}: {error}")

    def _workers(self) -> list[Process]:
        return [p for p in self.world.processes if p.is_alive and isinstance(p.extra, ShardWorker)]

    def _deliver(self) -> None:
        world = self.world
        if not any(world.queues.values()):
            return
        idle_first = sorted(self._workers(), key=lambda process: (len(process.actors), process.slot))
        for process in idle_first:
            worker = process.extra
            if process.asleep_until > world.now:
                continue
            if worker.capacity.takes_bound() and (message := world.take(worker.leases.queues[1])):
                self._receive(process, message)
            if worker.capacity.takes_common() and (message := world.take(QUEUE)):
                self._receive(process, message)

    def _receive(self, process: Process, message: tuple[Any, ...]) -> None:
        worker, (name, *arguments) = process.extra, message
        about = "finish" if name == FINISH_RUN else str(arguments[-1])
        if name == FINISH_RUN:
            call = lambda: worker.finish_run(*arguments)  # noqa: E731
        else:
            worker.capacity.received(task := f"{about} {len(process.actors)}")
            call = lambda: worker.tag_shard(task, *arguments)  # noqa: E731
        self.world.act(about, process, call, self._worker_ended)

    # The producer, and who cancels

    def _start_command(self, name: str) -> None:
        """Starts a command of an operator, who starts it again where it ends with an error."""
        world = self.world
        process = world.begin(name)

        def ended(result: Any, error: BaseException | None) -> None:
            if error is not None and not isinstance(error, NermillError):
                world.violated(f"the {name} raised {type(error).__name__}: {error}")
            if error is None:
                self.ended.add(name)
            world.kill(process)  # with its threads; see ``_died``

        world.act("main", process, self.commands[name], ended)

    def _start_command_later(self, name: str, seconds: float) -> None:
        self.world.later(seconds, name, lambda: self._start_command(name))

    def _produce(self) -> None:
        """``nermill submit --wait``, as the command does it."""
        scenario = self.scenario
        if scenario.is_stream:
            self._follow()
            return
        documents = [Document(str(at), text) for at, text in enumerate(scenario.documents)]
        source = SimpleNamespace(
            file=SimpleNamespace(uri="/in.jsonl", position=lambda: 0),
            format="jsonl",
            documents=lambda options: iter(
                [replace(d, gold_tags=() if scenario.has_gold else None) for d in documents]
            ),
        )
        limits = ShardLimits(documents=scenario.shard_documents)
        request = Request(("/in.jsonl",), scenario.out, limits=limits)
        found = Found([source], [("0" * 64, 1)], [])  # type: ignore[list-item]
        if scenario.by_value:
            self._send(request, found)
            return
        folder, plan = make_plan(request, found=found)
        self.run_uri = folder.uri
        queue = self._queue()
        plan = resume(folder, plan, queue)
        if not scenario.waits:
            return
        if not self.watch.is_compacted:
            self._wait(folder, plan, queue)
        if scenario.compacts:
            self.watch.is_compacted = True
            compact.compact(folder, read_plan(folder))

    def _send(self, request: Request, found: Found) -> None:
        """``nermill submit --by-value --wait``."""
        by_value.find_inputs = lambda request: found
        with by_value.packed(request) as packed:
            queue = self._queue()
            by_value.send(packed, queue)
            self._wait(packed.run, packed.plan, queue)

    def _follow(self) -> None:
        """``nermill submit --follow FILE --wait`` until somebody ends it."""
        scenario, queue = self.scenario, self._queue()
        limits = ShardLimits(documents=scenario.shard_documents)
        request = Request(("/in.jsonl",), scenario.out, limits=limits, by_value=scenario.by_value)
        try:
            durable = find_followed(request, queue)
        except UsageError as error:
            if "a stream by value does not go on after its end" not in str(error):
                raise
            self._wait(*open_seen_or_not(self.run_uri, lambda: queue), queue)  # ``nermill status --wait``
            return
        stream = (StreamByValue if scenario.by_value else Stream)(
            request.out,
            queue,
            options=request.options,
            limits=limits,
            linger=NEVER,
            source="/in.jsonl",
            run_id=followed_run_id(request),
            durable=durable,
        )
        process = self.world.actor.process  # type: ignore[union-attr]
        process.extra, self.run_uri = stream, stream.run.uri
        read = durable.position.line if durable and durable.position else 0
        for at, text in enumerate(scenario.documents[read:], read):
            stream.add(Document(str(at), text), Position(at + 1, at + 1, ""))
        self._wait(stream.run, stream.close(), queue, stream.send_again)

    def _wait(self, folder: RunFolder, plan: Plan, queue: Queue, send_again: Callable[[], None] | None = None) -> None:
        told = wait(folder, plan, queue, send_again=send_again)
        if told.state == "complete" and plan.has_gold and not plan.by_value and not folder.exists(REPORT_JSON):
            _evaluate(folder.uri)
        if told.state != "complete" and not self.scenario.cancels:
            self.world.violated(f"the producer waited until the run was {told.state}")

    def _cancel(self) -> None:
        """``nermill cancel``."""
        folder, plan = run.open_run(self.run_uri or self.scenario.out)
        run.cancel(folder, plan, self._queue())

    def _queue(self) -> Queue:
        made = Queue.__new__(Queue)
        client = _Client(self.world)
        made.url = "redis://world"
        made._client = client  # type: ignore[assignment]
        made._ledger = Ledger(client)
        made.__dict__["_dispatcher"] = Dispatcher(_Celery(self.world), made._ledger)
        return made

    def _is_over(self) -> bool:
        world = self.world
        idle = all(len(process.actors) <= 1 and process.asleep_until <= world.now for process in self._workers())
        asleep = any(actor.asleep_until > world.now for actor in world.actors)
        if not self.scenario.waits and not self.watch.is_finished():
            if "producer" in self.ended and self.watch.is_blocked():  # somebody looks, and sends it again
                self.ended.remove("producer")
                self._start_command_later("producer", self.scenario.operator)
            return False
        is_done = "producer" in self.ended and ("canceller" in self.ended or not self.scenario.cancels)
        return is_done and idle and not (asleep or any(world.queues.values()) or self.watch.has_leases())


@cache
def _metrics() -> Metrics:
    return Metrics()
