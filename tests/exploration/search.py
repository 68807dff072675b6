"""Searches: every schedule up to a bound of faults; random walks from a seed; a failing schedule made smaller."""

from __future__ import annotations

import gc
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache

from tests.exploration.mill import Mill, install
from tests.exploration.scenario import SCENARIOS, Scenario
from tests.exploration.world import Actor, Chosen, Fault, Memories, ViolationError, World

Schedule = dict[int, Fault]  # the fault in the place of a step, by the step's number


@dataclass(frozen=True)
class Failure:
    """A schedule that violates an invariant."""

    scenario: str
    schedule: Schedule
    what: str
    steps: list[Chosen]
    seed: int | None = None


@dataclass
class Tally:
    """What a search came to."""

    schedules: int = 0
    steps: int = 0
    states: int = 0
    seconds: float = 0.0
    is_whole: bool = True
    failures: list[Failure] = field(default_factory=list)

    def __str__(self) -> str:
        speed = self.steps / self.seconds if self.seconds else 0.0
        return (
            f"{self.schedules:,} schedules, {self.steps:,} steps, {self.states:,} states in {self.seconds:.1f} s "
            f"({speed:,.0f} steps/s){'' if self.is_whole else ', not whole'}, {len(self.failures)} failures"
        )


@dataclass(frozen=True)
class _Branch:
    """A schedule, and what all know at its last fault."""

    schedule: Schedule
    memories: Memories | None


class _KnownError(Exception):
    """Another schedule came to the same state before."""


def walk(
    scenario: Scenario,
    decide: Callable[[World, Actor], Fault | None],
    checked_from: int = 0,
    *,
    is_noting: bool = False,
) -> World:
    """One walk through a scenario, to its end.

    Raises:
        ViolationError: an invariant does not hold.
    """
    install()
    world = World(decide, scenario.pause)
    world.is_noting = is_noting
    mill = Mill(world, scenario)
    mill.watch.checked_from = checked_from
    world.run()
    mill.watch.check_end()
    return world


def follow(scenario: Scenario, schedule: Schedule) -> Failure | None:
    """Walks by a schedule; a fault that is not possible at its step is left out."""

    def decide(world: World, actor: Actor) -> Fault | None:
        fault = schedule.get(len(world.steps))
        return fault if fault in set(world.options(actor)) else None

    try:
        walk(scenario, decide)
    except ViolationError as violation:
        return Failure(scenario.name, schedule, str(violation), World.current.steps)
    return None


def exhaust(
    scenario: Scenario,
    bound: int,
    *,
    where: Callable[[Actor, Fault], bool] = lambda actor, fault: True,
    seconds: float = float("inf"),
    share: tuple[int, int] = (0, 1),
    stop: bool = True,
) -> Tally:
    """Walks every schedule with up to ``bound`` faults; two that come to one state are walked on once.

    Args:
        scenario: The world.
        bound: Faults in a schedule, switches among them.
        where: Which faults are tried, and in the place of which steps.
        seconds: Time after which the search ends, and is not whole.
        share: Of so many searches that divide the first faults among them, which one this is.
        stop: Whether the first failure ends it.
    """
    gc.disable()
    search, dice = _Search(scenario, bound, where), random.Random(0)
    begun, waiting = time.monotonic(), [_Branch({}, None)]
    while waiting and not (stop and search.tally.failures):
        if time.monotonic() - begun > seconds:
            search.tally.is_whole = False
            break
        if search.tally.schedules % 1000 == 0:  # what is known grows, and has no cycles
            gc.collect()
            gc.freeze()
        branch = waiting.pop()
        children = search.go(branch)
        if not branch.schedule:
            dice.shuffle(children)  # a search that ends early has seen some of everything
            children = children[share[0] :: share[1]]
        waiting += children
    gc.enable()
    search.tally.seconds = time.monotonic() - begun
    return search.tally


def at_writes(actor: Actor, fault: Fault) -> bool:
    """Deaths, pauses and failures at a worker's writes to the place of the run: what two workers do to one file."""
    is_write = actor.writes and actor.label.startswith(("disk.", "store.")) and actor.process.slot != "producer"
    return is_write and fault.kind in ("kill", "pause", "fail")


def at_a_second_command(actor: Actor, fault: Fault) -> bool:
    """Calls of the producer that fail after they took effect, so it is started again; the host's failure at a write."""
    if actor.process.slot == "producer":
        return fault.kind == "after" and actor.label.startswith("ledger.")
    return fault.kind == "power" and actor.writes and actor.label.startswith("disk.")


class _Search:
    """What an exhaustive search knows.

    Attributes:
        tally: What it came to so far.
    """

    def __init__(self, scenario: Scenario, bound: int, where: Callable[[Actor, Fault], bool]) -> None:
        self._scenario, self._bound, self._where = scenario, bound, where
        self._known: dict[int, list[tuple[int, ...]]] = {}  # at each state, faults already made and excuses
        self._offered: dict[object, int] = {}  # and at each outcome of a fault
        self.tally = Tally()

    def _is_known(self, signature: int, used: int, excuses: tuple[int, ...]) -> bool:
        """Whether a walk came to a state before, with no more faults made and no more excuses."""
        now = used, *excuses
        before = self._known.setdefault(signature, [])
        if any(all(a <= b for a, b in zip(then, now, strict=True)) for then in before):
            return True
        before.append(now)
        return False

    def go(self, branch: _Branch) -> list[_Branch]:
        """Walks by a schedule; returns those with one fault more."""
        schedule = branch.schedule
        remaining, last = self._bound - len(schedule), max(schedule, default=-1)
        children: list[_Branch] = []
        own: set[int] = set()

        def decide(world: World, actor: Actor) -> Fault | None:
            number = len(world.steps)
            if number == last and branch.memories:
                world.remember(branch.memories)
            if number <= last:
                return schedule.get(number)
            signature = world.signature()
            if self._is_known(signature, len(schedule), world.watch.excuses()):
                if signature in own:
                    raise ViolationError("no end: without another fault, this state comes again and again")
                raise _KnownError
            own.add(signature)
            if remaining:
                memories = world.memories()
                for fault in world.options(actor):
                    if not self._where(actor, fault):
                        continue
                    key = world.outcome(actor, fault, signature)
                    if self._offered.get(key, 0) < remaining:
                        self._offered[key] = remaining
                        children.append(_Branch({**schedule, number: fault}, memories))
            return None

        try:
            walk(self._scenario, decide, last, is_noting=not schedule)
        except _KnownError:
            pass
        except ViolationError as violation:
            self.tally.failures.append(Failure(self._scenario.name, schedule, str(violation), World.current.steps))
        self.tally.schedules += 1
        self.tally.steps += len(World.current.steps)
        self.tally.states = len(self._known)
        return children


def wander(scenario: Scenario, seed: int) -> tuple[World, Schedule, Failure | None]:
    """A random walk: as many faults as the seed says, at any step or at steps of one kind, with switches between."""
    dice = random.Random(f"{scenario.name} {seed}")
    rate = dice.choice((0.003, 0.01, 0.03))
    switches = dice.choice((0.0, 0.0, 0.05, 0.3))
    most = dice.choice((1, 2, 3, 5, 8))
    kinds = set(dice.sample(KINDS, dice.randint(1, len(KINDS))))
    target = dice.choice((None, *_labels(scenario))) if dice.random() < 0.5 else None
    schedule: Schedule = {}

    def chooses(actor: Actor) -> bool:
        chance = dice.random()
        return chance < rate if target is None else target == _kind(actor.label) and chance < 0.5

    def decide(world: World, actor: Actor) -> Fault | None:
        if dice.random() < switches:
            options = [fault for fault in world.options(actor) if fault.kind == "switch"]
        elif chooses(actor) and world.faults < most:
            options = [fault for fault in world.options(actor) if fault.kind in kinds]
        else:
            return None
        if not options:
            return None
        kind = dice.choice(sorted({fault.kind for fault in options}))
        fault = schedule[len(world.steps)] = dice.choice([fault for fault in options if fault.kind == kind])
        return fault

    failure = None
    try:
        walk(scenario, decide)
    except ViolationError as violation:
        failure = Failure(scenario.name, schedule, str(violation), World.current.steps, seed)
    return World.current, schedule, failure


def _kind(label: str) -> str:
    """What a step does, without what it does it to: ``disk.link part``, ``ledger.lease``."""
    return re.split(r"[-0-9{]", label)[0].strip()


@cache
def _labels(scenario: Scenario) -> tuple[str, ...]:
    """The kinds of steps of a scenario without faults."""
    with suppress(ViolationError):
        walk(scenario, lambda world, actor: None)
    return tuple(sorted({_kind(step.label) for step in World.current.steps}))


KINDS = ("kill", "pause", "stall", "fail", "after", "lose", "repeat", "drop", "power")


def wandering(
    names: tuple[str, ...], seeds: Iterator[int], *, seconds: float = float("inf"), stop: bool = True
) -> Tally:
    """Random walks through scenarios in turn, until the seeds or the time are used up."""
    tally, begun = Tally(), time.monotonic()
    for seed in seeds:
        if time.monotonic() - begun > seconds or (stop and tally.failures):
            break
        world, _, failure = wander(SCENARIOS[names[seed % len(names)]], seed)
        tally.schedules += 1
        tally.steps += len(world.steps)
        if failure:
            tally.failures.append(failure)
    tally.seconds = time.monotonic() - begun
    return tally


def shrink(failure: Failure, seconds: float = 30.0) -> Failure:
    """Leaves out of a failing schedule what it fails without."""
    scenario, deadline = SCENARIOS[failure.scenario], time.monotonic() + seconds
    smallest, is_smaller = failure, True
    while is_smaller and time.monotonic() < deadline:
        is_smaller = False
        for number in sorted(smallest.schedule, reverse=True):
            rest = {at: fault for at, fault in smallest.schedule.items() if at != number}
            if again := follow(scenario, rest):
                smallest, is_smaller = again, True
                break
    return smallest
