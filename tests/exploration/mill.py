"""A scenario at work: the product's own workers and producer in a simulated world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError

from nermill.producer.runs import base_stream, by_value, compact, run
from nermill.producer.runs.base_stream import BaseStream
from nermill.producer.runs.by_value import open_seen_or_not
from nermill.producer.runs.continuation import find_followed, followed_run_id
from nermill.producer.runs.planning import Found, Request, make_plan
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.rejects import retry
from nermill.producer.runs.run import resume, wait
from nermill.producer.runs.shards import ShardLimits
from nermill.producer.runs.stream import Stream
from nermill.producer.runs.stream_by_value import StreamByValue
from nermill.producer.sources.live import Position
from nermill.worker.contracts.dispatch import Dispatcher
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import MessageError, NermillError, UsageError
from nermill.worker.contracts.layout import REPORT_JSON, RunFolder
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.message import FINISH_RUN, QUEUE
from nermill.worker.contracts.plan import Plan, read_plan
from nermill.worker.process.metrics import Metrics
from nermill.worker.queue import capacity
from nermill.worker.queue.capacity import Capacity
from nermill.worker.queue.leases import Leases
from nermill.worker.queue.poison import Isolation
from nermill.worker.queue.shards import ShardWorker
from nermill.worker.queue.watchdog import Watchdog
from tests.exploration import world as simulated
from tests.exploration.invariants import Watch
from tests.exploration.scenario import LEASE, Scenario
from tests.exploration.stand_ins import CeleryApp, Client, Model, WorkerSettings, evaluate, replace_modules
from tests.exploration.state import digest
from tests.exploration.world import MAX_POSITIONS, Actor, Process, World

NEVER = 1e6  # seconds: a shard leaves when it is full

_SHARED: dict[tuple[str, int, float], int] = {}
_CONSTANT = frozenset(("pipeline", "metrics", "identity", "queues", "ledger", "_ledger", "_documents", "_dispatcher"))
_CONSTANT_OF_STREAM = frozenset(("_queue", "_limits", "_on_shard", "_threads", "run"))
_TOLD_ELSEWHERE = frozenset(("_settings", "_lock", "_received"))


@cache
def install() -> None:
    """Puts the world in the place of the modules through which the product reaches the outside."""
    replace_modules()
    World.opaque = (World, Watch, Mill, Actor, Process, Scenario, Ledger, Dispatcher, Queue, ShardWorker, RunFolder)
    World.opaque += (
        Stream,
        StreamByValue,
        Model,
        Client,
        WorkerSettings,
        Metrics,
        Leases,
        Capacity,
        Watchdog,
        Isolation,
    )


class Mill:
    """A scenario at work: its processes, and what restarts them."""

    def __init__(self, world: World, scenario: Scenario) -> None:
        self.world, self.scenario = world, scenario
        run._POLL_SECONDS = scenario.polls
        base_stream.LOOK_SECONDS = scenario.polls[0]
        self.commands = {"producer": self._produce, "canceller": self._cancel, "other": self._resume}
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
        if scenario.resumes:
            self._start_command_later("other", scenario.polls[0])

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
        key = self.scenario.name, process.memory, self.world.now
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
        book = Ledger(Client(world))
        settings = WorkerSettings(model=process.name, lease_seconds=LEASE, concurrency=self.scenario.concurrency)
        worker = ShardWorker(
            Model(world, self.scenario, process),  # type: ignore[arg-type]
            book,
            Dispatcher(CeleryApp(world), book),
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
        while scenario.retries and self._retry(folder, plan, queue):
            self._wait(folder, plan, queue)
        if scenario.compacts:
            self.watch.is_compacted = True
            compact.compact(folder, read_plan(folder))

    def _retry(self, folder: RunFolder, plan: Plan, queue: Queue) -> int:
        """``nermill rejects --retry``."""
        self.watch.is_retried = True
        found = retry(folder, plan, queue)
        self.watch.retried += bool(found.again)
        return found.again + found.at_work

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
            evaluate(folder.uri)
        if told.state != "complete" and not self.scenario.cancels:
            self.world.violated(f"the producer waited until the run was {told.state}")

    def _cancel(self) -> None:
        """``nermill cancel``."""
        folder, plan = run.open_run(self.run_uri or self.scenario.out)
        run.cancel(folder, plan, self._queue())

    def _resume(self) -> None:
        """``nermill resume --wait``, again and again, beside the producer of the run."""
        for _ in range(self.scenario.resumes):
            folder, plan = run.open_run(self.run_uri or self.scenario.out)
            queue = self._queue()
            plan = resume(folder, plan, queue)
            if not plan.is_open:
                self._wait(folder, plan, queue)
            run.time.sleep(self.scenario.polls[0])

    def _queue(self) -> Queue:
        made = Queue.__new__(Queue)
        client = Client(self.world)
        made.url = "redis://world"
        made._client = client  # type: ignore[assignment]
        made._ledger = Ledger(client)
        made.__dict__["_dispatcher"] = Dispatcher(CeleryApp(self.world), made._ledger)
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
        others = {"canceller": self.scenario.cancels, "other": self.scenario.resumes}
        is_done = {"producer", *(name for name, is_there in others.items() if is_there)} <= self.ended
        return is_done and idle and not (asleep or any(world.queues.values()) or self.watch.has_leases())


@cache
def _metrics() -> Metrics:
    return Metrics()
