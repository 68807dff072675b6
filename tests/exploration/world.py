"""A world of processes whose every step a schedule decides: who goes on, who dies, what fails, how time passes.

An actor is what the product runs in a thread or process: it is a greenlet here, and each of its calls of store, ledger
or queue is a step, before which it waits for the world. Steps take no time. Time passes where all actors sleep or wait,
and where a fault lets it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from greenlet import getcurrent, greenlet

from tests.exploration.places import Bucket, Disk
from tests.exploration.server import Server
from tests.exploration.state import BEGIN, UnknownError, View, digest, position

MAX_STEPS = 4_000
MAX_SECONDS = 3_000.0  # of the world's time, in which every run must end
MAX_POSITIONS = 200_000
_POSITIONS: dict[tuple[int, str, float], int | None] = {}  # where an actor waits, by all that its process was told


# Of processes, and of actors.
Memories = tuple[tuple[tuple[str, int, int], ...], tuple[tuple[str, int, tuple[float, ...]], ...]]


class Killed(BaseException):
    """The actor's process is dead: what it still does has no effect."""


class ViolationError(Exception):
    """An invariant does not hold."""


@dataclass(frozen=True, order=True)
class Fault:
    """What happens in the place of the next step.

    Attributes:
        kind: ``switch`` to another actor; ``kill`` or ``pause`` the actor's process for longer than a lease; ``stall``
            the actor alone for as long; ``fail`` its call, or let it fail ``after`` it took effect; ``lose`` or
            ``repeat`` a message; ``drop`` the broker's memory; ``power``: the host fails.
        what: Actor, queue or message.
    """

    kind: str
    what: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.what}".strip()


@dataclass(eq=False)
class Process:
    """A process of the world.

    Attributes:
        memory: A hash of all that its actors were told.
        shared: A hash of what they have in common, its ``extra``; ``noted``: when that was.
    """

    name: str
    slot: str
    is_alive: bool = True
    asleep_until: float = 0.0
    is_hindered: bool = False
    memory: int = 0
    shared: int = 0
    noted: float = 0.0
    actors: list[Actor] = field(default_factory=list)
    extra: Any = None


@dataclass(eq=False)
class Actor:
    """A thread of a process. It is due where ``label`` is set, or ``ready()`` holds, or ``wake`` has come.

    Attributes:
        about: What it does, in which process.
        memory: A hash of where it last waited, and of all that it was told since.
        reads: Times that it knows: when that was, and what it read from clocks since.
        held: Locks that it holds.
    """

    name: str
    process: Process
    run: greenlet
    about: str
    label: str = ""
    writes: bool = False
    failure: Callable[[], Exception] | None = None
    ready: Callable[[], bool] | None = None
    wake: float | None = None
    asleep_until: float = 0.0
    is_done: bool = False
    begun: bool = False
    memory: int = 0
    reads: list[float] = field(default_factory=list)
    held: int = 0
    on_end: Callable[[Any, BaseException | None], None] | None = None


@dataclass(frozen=True)
class Chosen:
    """A step of a walk: its number, who was due, at what, and the fault in its place, if any."""

    number: int
    actor: str
    label: str
    fault: Fault | None

    def __str__(self) -> str:
        return f"{self.number:5d}  {self.actor:14s} {self.label}" + (f"   <-- {self.fault}" if self.fault else "")


class World(View):
    """One world.

    Args:
        decide: Asked before each step; the fault that takes its place, or None.
        pause: Seconds of ``pause`` and ``stall``: more than a lease.
    """

    current: World

    def __init__(self, decide: Callable[[World, Actor], Fault | None], pause: float) -> None:
        World.current = self
        self.decide = decide
        self.pause = pause
        self.now = BEGIN
        self.ids, self.generations = {}, {}
        self.server = Server(self)
        self.queues: dict[str, list[tuple[int, int, tuple[Any, ...]]]] = {}
        self.taken: list[tuple[str, int, tuple[Any, ...]]] = []  # messages that were received, each once
        self.disk = Disk(self)
        Bucket.begin(self)
        self.hub = getcurrent()
        self.processes: list[Process] = []
        self.actors: list[Actor] = []
        self.timers: list[tuple[float, str, Callable[[], None]]] = []
        self.preferred: Actor | None = None
        self.steps: list[Chosen] = []
        self.violations: list[str] = []
        self.faults = 0
        self.is_noting = True
        self.watch: Any = None
        self.deliver: Callable[[], None] = lambda: None
        self.is_over: Callable[[], bool] = lambda: False
        self.may_drop = True
        self.blind: tuple[str, ...] = ()  # slots of processes on hosts without the disk
        self._sent = 0
        self._is_moved, self._moved = True, 0  # since the last call of ledger or queue, all is as it was for messages
        self._numbers: dict[str, int] = {}

    # What actors call

    @property
    def actor(self) -> Actor | None:
        """Whoever is running; None where it is the world itself."""
        running = getcurrent()
        return getattr(running, "actor", None)

    def step(
        self,
        label: str,
        effect: Callable[[], Any],
        *,
        writes: bool = False,
        failure: Callable[[], Exception] | None = None,
    ) -> Any:
        """Does something that others can see, once the world lets it; a label of "" waits for nobody.

        Raises:
            Killed: the actor's process is dead; nothing was done.
            Exception: what ``effect`` or ``failure`` say.
        """
        actor = self.actor
        if actor is None:
            return effect()
        if actor.held and label:
            self.violated(f"{label} while a lock is held")
        process = actor.process
        if not process.is_alive:
            raise Killed
        if not label:
            result = effect()
            self._tell(actor, result)
            return result
        actor.label, actor.writes, actor.failure = label, writes, failure
        order = self.hub.switch()
        if not process.is_alive:
            raise Killed
        actor.label = ""
        if order == "fail":
            self._tell(actor, (label, "failed"))
            assert failure is not None
            raise failure()
        try:
            result = effect()
        except Exception as error:
            self._tell(actor, (label, str(error)))
            raise
        self._tell(actor, (label, order, result))
        if order == "after":
            assert failure is not None
            raise failure()
        return result

    def memories(self) -> Memories:
        """What all know."""
        processes = tuple((p.name, p.memory, p.shared) for p in self.processes if p.is_alive)
        return processes, tuple((actor.name, actor.memory, tuple(actor.reads)) for actor in self.actors)

    def remember(self, memories: Memories) -> None:
        """Gives all what they know; from now on it is noted what they are told."""
        self.is_noting = True
        processes = {process.name: process for process in self.processes}
        for name, memory, shared in memories[0]:
            processes[name].memory, processes[name].shared = memory, shared
        for actor, (name, memory, reads) in zip(self.actors, memories[1], strict=True):
            assert actor.name == name
            actor.memory, actor.reads = memory, list(reads)

    def _tell(self, actor: Actor, what: Any) -> None:
        if not self.is_noting:
            return
        told = digest(what, self)
        actor.process.memory = hash((actor.process.memory, actor.name, told))
        actor.memory = hash((actor.memory, told))

    def tell(self, what: Any) -> None:
        """Whoever calls knows something now that the state of the world does not say."""
        if (actor := self.actor) is not None:
            self._tell(actor, what)

    def sees_disk(self) -> bool:
        return self.actor is None or self.actor.process.slot not in self.blind

    def await_(self, ready: Callable[[], bool] | None, timeout: float | None) -> None:
        """Waits until a condition holds or so much time has passed."""
        actor = self.actor
        assert actor is not None
        if not actor.process.is_alive:
            raise Killed
        actor.ready, actor.wake = ready, None if timeout is None else self.now + timeout
        self._forget(actor)
        self.hub.switch()
        actor.ready = actor.wake = None
        if not actor.process.is_alive:
            raise Killed

    def _forget(self, actor: Actor) -> None:
        """Takes where an actor waits in the place of all that it was told, where its variables say all."""
        if not self.is_noting:
            return
        key = actor.process.memory, actor.name, self.now
        if key not in _POSITIONS:
            if len(_POSITIONS) > MAX_POSITIONS:
                _POSITIONS.clear()
            try:
                _POSITIONS[key] = position(sys._getframe(2), self)
            except UnknownError:
                _POSITIONS[key] = None
        if (place := _POSITIONS[key]) is not None:
            actor.memory, actor.reads = place, [self.now]

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.await_(None, seconds)

    def identifier(self) -> str:
        """A name that nobody else is given: 32 hexadecimal digits, the same in the same schedule."""
        owner = self.actor.name if self.actor else "world"
        about = self.actor.about if self.actor else owner
        number = self.number(f"{owner}@{self.now}")
        found = hashlib.md5(f"{owner}@{self.now} {number}".encode(), usedforsecurity=False).hexdigest()
        self.ids[found] = f"{about} {number}", self.now
        self.clock()
        self.tell(found)
        return found

    def clock(self) -> float:
        """The time, for whoever runs."""
        if (actor := self.actor) is not None and self.is_noting:
            actor.reads.append(self.now)
            self._tell(actor, self.now)
        return self.now

    def number(self, name: str) -> int:
        """How often a name was asked for, this time included."""
        self._numbers[name] = self._numbers.get(name, 0) + 1
        return self._numbers[name]

    def die(self) -> None:
        """The process of whoever calls ends now."""
        actor = self.actor
        assert actor is not None
        self.kill(actor.process)
        raise Killed

    def violated(self, what: str) -> None:
        """Notes that an invariant does not hold; the walk ends there."""
        self.violations.append(what)

    # What scenarios set up

    def begin(self, slot: str) -> Process:
        """Begins a process, under a name that none had before."""
        number = self.generations[slot] = self.generations.get(slot, -1) + 1
        process = Process(f"{slot}.{number}", slot, noted=self.now)
        self.processes.append(process)
        return process

    def act(
        self,
        about: str,
        process: Process,
        what: Callable[[], Any],
        on_end: Callable[[Any, BaseException | None], None] | None = None,
    ) -> Actor:
        """Begins an actor of a process; ``on_end`` is told its result or what it raised, unless it is killed.

        It is named by what it does, and when it begins.
        """

        def body(*_: Any) -> None:
            result, error = None, None
            try:
                result = what()
            except Killed:
                return
            except Exception as raised:
                error = raised
            if process.is_alive and actor.on_end is not None:
                actor.on_end(result, error)

        run = greenlet(body, self.hub)
        name = f"{process.name}/{about}@{self.now - BEGIN:g}"
        number = self.number(name)
        actor = Actor(
            name if number == 1 else f"{name}.{number}",
            process,
            run,
            f"{process.slot}/{about} {number}",
            on_end=on_end,
        )
        run.actor = actor
        process.actors.append(actor)
        self.actors.append(actor)
        return actor

    def kill(self, process: Process) -> None:
        """Ends a process at once."""
        if not process.is_alive:
            return
        process.is_alive = False
        running = self.actor
        for actor in process.actors:
            if actor is not running:
                self._end(actor)
        self.actors = [actor for actor in self.actors if actor.process.is_alive]
        self.at_death(process)

    shared: Callable[[Process], int] = staticmethod(lambda process: 0)
    memory: Callable[[], object] = staticmethod(lambda: None)  # what the scenario and the invariants remember
    at_death: Callable[[Process], None] = staticmethod(lambda process: None)

    def _end(self, actor: Actor) -> None:
        actor.is_done = True
        if actor.begun and not actor.run.dead:
            actor.run.parent = getcurrent()
            actor.run.throw(Killed)

    def later(self, seconds: float, name: str, what: Callable[[], None]) -> None:
        self.timers.append((self.now + seconds, name, what))

    # Messages

    def send(self, queue: str, priority: int, message: tuple[Any, ...]) -> None:
        self._sent += 1
        self.queues.setdefault(queue, []).append((priority, self._sent, message))
        self.queues[queue].sort(key=lambda entry: entry[:2])

    def take(self, queue: str) -> tuple[Any, ...] | None:
        """The next message of a queue."""
        if not self.queues.get(queue):
            return None
        priority, _, message = self.queues[queue].pop(0)
        if (entry := (queue, priority, message)) not in self.taken:
            self.taken.append(entry)
        return message

    def depth(self, queue: str) -> int:
        return len(self.queues.get(queue, ()))

    # The walk

    def run(self) -> None:
        """Goes on until the scenario is over.

        Raises:
            ViolationError: an invariant does not hold.
        """
        try:
            self._run()
        finally:
            for process in self.processes:
                self.at_death = lambda process: None
                self.kill(process)

    def _run(self) -> None:
        while True:
            self.deliver()
            actor = self._due()
            if actor is None:
                if self.is_over():
                    return
                self._pass_time()
                continue
            if actor.label:
                fault = self.decide(self, actor)
                if len(self.steps) >= MAX_STEPS:
                    raise ViolationError(f"no end after {MAX_STEPS} steps")
                self.steps.append(Chosen(len(self.steps), actor.name, actor.label, fault))
                if fault is not None:
                    self.faults += fault.kind != "switch"
                    if not self._befall(actor, fault):
                        self._verify(actor)
                        continue
            self._resume(actor, fault.kind if actor.label and fault is not None else "")
            self._verify(actor)

    def _verify(self, actor: Actor) -> None:
        if self.violations:
            raise ViolationError("; ".join(self.violations))
        self.watch.check()

    def _is_due(self, actor: Actor) -> bool:
        if max(actor.process.asleep_until, actor.asleep_until) > self.now or not actor.process.is_alive:
            return False
        if actor.label or not actor.begun:
            return True
        return (actor.ready is not None and actor.ready()) or (actor.wake is not None and actor.wake <= self.now)

    def due(self) -> list[Actor]:
        """Actors that may go on now."""
        return [actor for actor in self.actors if self._is_due(actor)]

    def _due(self) -> Actor | None:
        if self.preferred is not None and not self.preferred.is_done and self._is_due(self.preferred):
            return self.preferred
        self.preferred = next(iter(self.due()), None)
        return self.preferred

    def _pass_time(self) -> None:
        moments = [moment for moment, _, _ in self.timers]
        for actor in self.actors:
            asleep = max(actor.process.asleep_until, actor.asleep_until)
            if asleep > self.now:
                moments.append(asleep)
            elif actor.wake is not None:
                moments.append(actor.wake)
        if not moments:
            raise ViolationError("nobody goes on, and the work is not done")
        self._is_moved = True
        self.now = max(self.now, min(moments))
        if self.now - BEGIN > MAX_SECONDS:
            raise ViolationError(f"no end after {MAX_SECONDS:.0f} seconds of the world")
        self.server.end_keys()
        due = [timer for timer in self.timers if timer[0] <= self.now]
        self.timers = [timer for timer in self.timers if timer[0] > self.now]
        for _, _, what in due:
            what()

    def _resume(self, actor: Actor, order: str) -> None:
        self._is_moved |= not actor.label.startswith(("disk", "store"))
        actor.begun = True
        process = actor.process
        if self.is_noting:
            process.memory = hash((process.memory, actor.name, self.now))
            if process.extra is not None:
                actor.memory = hash((actor.memory, process.shared, self.moment(process.noted)))
                actor.reads.append(self.now)
        process.noted = self.now
        actor.run.switch(order)
        if self.is_noting:
            process.shared = self.shared(process)
        if actor.run.dead:
            actor.is_done = True
            if actor in self.actors:
                self.actors.remove(actor)
                actor.process.actors.remove(actor)

    def _befall(self, actor: Actor, fault: Fault) -> bool:
        """Lets a fault happen; returns whether the actor's step is made nevertheless."""
        kind = fault.kind
        self._is_moved = True
        if kind != "switch":
            actor.process.is_hindered = True
            self.watch.befell(kind, actor.process)
        if kind in ("fail", "after"):
            return True
        if kind == "switch":
            self.preferred = next(other for other in self.actors if other.name == fault.what)
        elif kind == "kill":
            self.kill(actor.process)
        elif kind == "pause":
            actor.process.asleep_until = self.now + self.pause
        elif kind == "stall":
            actor.asleep_until = self.now + self.pause
        elif kind == "lose":
            self.queues[fault.what].pop(0)
        elif kind == "repeat":
            queue, priority, message = next(entry for entry in self.taken if named(entry[2]) == fault.what)
            self.send(queue, priority, message)
        elif kind == "drop":
            self.server.forget_all()
            self.queues.clear()
        elif kind == "power":
            self.disk.fail()
            for process in list(self.processes):
                self.kill(process)
        return False

    def options(self, actor: Actor) -> Iterator[Fault]:
        """The faults that may take the place of an actor's step."""
        for other in self.due():
            if other is not actor:
                yield Fault("switch", other.name)
        yield Fault("kill", actor.process.slot)
        yield Fault("pause", actor.process.slot)
        if len(actor.process.actors) > 1:
            yield Fault("stall", actor.name)
        if actor.failure is not None:
            yield Fault("fail")
            if actor.writes:
                yield Fault("after")
        for queue, messages in self.queues.items():
            if messages:
                yield Fault("lose", queue)
        waiting = {named(message) for messages in self.queues.values() for _, _, message in messages}
        for _, _, message in self.taken:
            if named(message) not in waiting:
                yield Fault("repeat", named(message))
        if self.server.values and self.may_drop:
            yield Fault("drop")
        yield Fault("power")

    def surroundings(self) -> int:
        """A hash of what outlives processes."""
        queues = tuple(
            (queue, tuple((priority, message) for priority, _, message in messages))
            for queue, messages in sorted(self.queues.items())
            if messages
        )
        places = self.disk.digest(), Bucket.digest()
        timers = tuple((self.moment(at), name) for at, name, _ in self.timers)
        return hash((self.server.digest(), queues, frozenset(self.taken), places, timers, digest(self.memory(), self)))

    def outcome(self, actor: Actor, fault: Fault, signature: int) -> object:
        """What is equal for two faults after which a world goes on alike; ``signature`` is that of the world now."""
        if fault.kind == "kill":
            return fault, self.signature(lambda process: process is not actor.process)
        if fault.kind == "power":
            return fault, tuple(process.slot for process in self.processes if process.is_alive), self.surroundings()
        if fault.kind in ("lose", "repeat", "drop"):
            if self._is_moved:
                self._is_moved, self._moved = False, signature
            return fault, self._moved
        return fault, signature

    def signature(self, of: Callable[[Process], bool] = lambda process: True) -> int:
        """A hash of all that decides how this world goes on, or would with some of its processes alone."""
        processes = tuple(
            (process.slot, process.shared, self.moment(process.noted), max(self.moment(process.asleep_until), 0.0))
            for process in self.processes
            if process.is_alive and of(process)
        )
        actors = tuple(
            (
                (a.about, a.label, a.begun, a.memory, tuple(map(self.moment, dict.fromkeys(a.reads)))),
                None if a.wake is None else self.moment(a.wake),
                max(self.moment(a.asleep_until), 0.0),
            )
            for a in self.actors
            if of(a.process)
        )
        preferred = self.actors.index(self.preferred) if self.preferred in self.actors else None
        return hash((self.surroundings(), processes, actors, preferred))


def named(message: tuple[Any, ...]) -> str:
    """What a message is about."""
    return " ".join(map(str, message[1:]))


# In the place of modules, for the product's code. All refer to the world that is current.


class _Event:
    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout: float | None = None) -> bool:
        if not self._is_set and timeout != 0:
            World.current.await_(self.is_set, timeout)
        return self._is_set


class _Condition:
    """Nobody else goes on while it is held, as its holder makes no step; who waits goes on when told to."""

    def __init__(self) -> None:
        self._waiting: list[list[bool]] = []

    def __enter__(self) -> None:
        if (actor := World.current.actor) is not None:
            actor.held += 1

    def __exit__(self, *_: object) -> None:
        if (actor := World.current.actor) is not None:
            actor.held -= 1

    def notify_all(self) -> None:
        for told in self._waiting:
            told[0] = True
        self._waiting = []

    def wait(self, timeout: float | None = None) -> None:
        told = [False]
        self._waiting.append(told)
        actor = World.current.actor
        assert actor is not None
        held, actor.held = actor.held, 0
        World.current.await_(lambda: told[0], timeout)
        actor.held = held

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> None:
        until = None if timeout is None else World.current.clock() + timeout
        while not predicate() and (until is None or World.current.now < until):
            self.wait(None if until is None else until - World.current.now)


class _Thread:
    """An actor of its maker's process."""

    def __init__(self, *, target: Callable[..., Any], args: list[Any], name: str, daemon: bool) -> None:
        self._name, self._call = name, lambda: target(*args)

    def start(self) -> None:
        world = World.current
        assert world.actor is not None
        self._actor = world.act(self._name, world.actor.process, self._call)

    def join(self) -> None:
        if not self._actor.is_done:
            World.current.await_(lambda: self._actor.is_done, None)


class _Pool:
    """A pool whose calls are made by whoever asks."""

    def __init__(self, *_: object) -> None: ...
    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None: ...
    def map(self, call: Callable[[Any], Any], items: Any) -> Iterator[Any]:
        return map(call, items)


def _now() -> float:
    return World.current.clock()


event = _Event
pool = _Pool
clock = SimpleNamespace(
    time=_now,
    monotonic=_now,
    sleep=lambda seconds: World.current.sleep(seconds),
    strftime=lambda *_: "",
    gmtime=lambda: 0,
)
identifiers = SimpleNamespace(uuid4=lambda: SimpleNamespace(hex=World.current.identifier()))
threading = SimpleNamespace(Condition=_Condition, Thread=_Thread)
