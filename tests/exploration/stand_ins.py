"""What stands in the place of the modules through which the product reaches the outside."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from nermill.worker.contracts import layout, ledger, part, shard, store
from nermill.worker.contracts.document import Fault
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.message import KEY_PREFIX
from nermill.worker.contracts.plan import Options
from nermill.worker.contracts.schema import part_schema
from nermill.worker.evaluation import report
from nermill.worker.process.settings import Settings
from nermill.worker.queue import capacity, finish, leases, poison, shards, watchdog
from nermill.worker.tagging import parts
from nermill.worker.tagging.clock import DeviceClock
from nermill.worker.tagging.pipeline import Annotated, Stats
from tests.exploration import world as simulated
from tests.exploration.places import Bucket
from tests.exploration.scenario import FLAKY, POISON, Scenario
from tests.exploration.server import Server
from tests.exploration.world import Process, World

ARTIFACT = "a" * 64

# Arguments in the name of a step: none that differs where it comes later.
_TOLD = {"register": 1, "close": 2, "unable": 2}
_READS = ("load", "workers", "waiting")  # steps of the ledger that change nothing


class Client:
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

            return self._step(f"{args[0]} {about}", effect, writes=args[0] not in _READS)

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


class CeleryApp:
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


class WorkerSettings(Settings):
    @property
    def worker_name(self) -> str:
        return self.model  # as no worker of the world asks for its model by name


class Model:
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
        fails = FLAKY if not self._world.watch.is_retried else ""
        self._world.tell((attempt, fails))
        texts = tuple(
            zip(table["doc_id"].to_pylist(), table["text"].to_pylist(), table["fault_reason"].to_pylist(), strict=True)
        )
        on_fed(SimpleNamespace(tokens_done=0, tokens=SimpleNamespace(ids=())))
        self._world.sleep(self._scenario.seconds[first // self._scenario.shard_documents])
        self._world.watch.annotated(self._process)
        if any(text == POISON and fault is None for _, text, fault in texts):
            self._world.watch.poison()
            self._world.die()
        return _annotated(texts, first, attempt, fails)


@cache
def _annotated(texts: tuple[tuple[str, str, str | None], ...], first: int, computed: int, fails: str) -> Annotated:
    texts = tuple((name, text, "model_failure" if text == fails else fault) for name, text, fault in texts)
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


def evaluate(uri: str) -> str:
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
def replace_modules() -> None:
    """Puts the world in the place of the modules through which the product reaches the outside."""
    logging.disable(logging.CRITICAL)
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
    finish.evaluate_apart = evaluate
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
