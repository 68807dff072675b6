"""``python -m tests.exploration``: explores the queue's protocol, replays a walk, or looks for mutants."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from tests.exploration.agreement import disagreements
from tests.exploration.scenario import SCENARIOS, Scenario
from tests.exploration.search import (
    Failure,
    Schedule,
    Tally,
    at_a_second_command,
    at_writes,
    exhaust,
    follow,
    shrink,
    wander,
    wandering,
)
from tests.exploration.world import Fault, World

MUTANT_SECONDS = 240.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.exploration", description=__doc__)
    parser.add_argument("--scenario", action="append", choices=sorted(SCENARIOS), help="explore these alone")
    parser.add_argument("--faults", type=int, default=1, help="most faults in a schedule of the exhaustive search")
    parser.add_argument("--slice", default="1/1", metavar="K/N", help="of the exhaustive search, the K-th of N parts")
    parser.add_argument("--walks", type=int, default=2000, help="random walks; the seeds are those from --seed on")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="after which each search ends, and is not whole"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=0, help="first seed of the random walks")
    parser.add_argument("--replay", metavar="SEED|SCHEDULE", help="walk again: a seed, or STEP:FAULT,STEP:FAULT")
    parser.add_argument("--agreement", action="store_true", help="walk at random; do worlds that seem alike go on so?")
    parser.add_argument("--mutants", action="store_true", help="explore the product with faults seeded into its code")
    parser.add_argument("--mutant", action="append", help="these mutants alone")
    parser.add_argument("--hunt", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    names = tuple(given.scenario or SCENARIOS)
    if given.replay is not None:
        return replay(names, given.replay)
    if given.mutants or given.mutant:
        from tests.exploration.mutants import run_mutants

        return run_mutants(given.mutant, given.jobs, min(given.seconds, MUTANT_SECONDS))
    if given.agreement:
        return agree(names, given.walks)
    if given.hunt:
        return hunt(names, given.seconds)
    part, parts = map(int, given.slice.split("/"))
    shares = [((part - 1) * given.jobs + number, parts * given.jobs) for number in range(given.jobs)]
    failures: list[Failure] = []
    with ProcessPoolExecutor(given.jobs) as pool:
        for name in names:
            search = partial(share_of, SCENARIOS[name], given.faults, given.seconds)
            tally = together(list(pool.map(search, shares)))
            of = "" if parts == 1 else f"part {given.slice} of "
            print(f"{name}: {of}every schedule of {given.faults} faults at most: {tally}", flush=True)
            failures += tally.failures
        tally = together(
            list(pool.map(partial(walks, names, given.seed, given.walks, given.seconds, given.jobs), range(given.jobs)))
        )
        print(f"random walks from seed {given.seed}: {tally}", flush=True)
        failures += tally.failures
    for failure in failures[:5]:
        tell(shrink(failure))
    return 1 if failures else 0


def hunt(names: tuple[str, ...], seconds: float) -> int:
    """Ends with the first failure: of single faults, of pairs at certain steps, then of random walks."""
    begun = time.monotonic()
    for search in (
        *(partial(exhaust, SCENARIOS[name], 1, seconds=seconds / 2) for name in names),
        *(
            partial(exhaust, SCENARIOS[name], 2, where=where, seconds=seconds / 2)
            for where in (at_a_second_command, at_writes)
            for name in names
        ),
        *(partial(wandering, some, itertools.count(), seconds=seconds / 2) for some in (names, tuple(SCENARIOS))),
    ):
        tally = search()
        if tally.failures:
            failure = tally.failures[0]
            schedule = ", ".join(f"{number} {fault}" for number, fault in failure.schedule.items()) or "no fault"
            print(f"{failure.what} ({failure.scenario}: {schedule}; {time.monotonic() - begun:.0f} s)")
            return 1
    return 0


def agree(names: tuple[str, ...], walks: int) -> int:
    """Walks at random, and tells of worlds that seemed alike and did not go on alike."""
    is_well = True
    for name in names:
        again, found = disagreements(SCENARIOS[name], range(walks))
        print(f"{name}: {walks:,} walks, {again:,} worlds like one before, {len(found)} went on otherwise", flush=True)
        print(*found[:5], sep="\n", end="\n" if found else "")
        is_well &= not found
    return 0 if is_well else 1


def share_of(scenario: Scenario, bound: int, seconds: float, share: tuple[int, int]) -> Tally:
    return exhaust(scenario, bound, seconds=seconds, share=share)


def walks(names: tuple[str, ...], seed: int, most: int, seconds: float, jobs: int, number: int) -> Tally:
    return wandering(names, iter(range(seed + number, seed + most, jobs)), seconds=seconds)


def together(tallies: list[Tally]) -> Tally:
    """Searches that ran beside each other as one."""
    return Tally(
        schedules=sum(tally.schedules for tally in tallies),
        steps=sum(tally.steps for tally in tallies),
        states=sum(tally.states for tally in tallies),
        seconds=max(tally.seconds for tally in tallies),
        is_whole=all(tally.is_whole for tally in tallies),
        failures=[failure for tally in tallies for failure in tally.failures],
    )


def replay(names: tuple[str, ...], what: str) -> int:
    """Walks again and shows the steps: by a seed, whose scenario it says as well, or by a schedule."""
    if what.isdecimal():
        scenario = SCENARIOS[names[int(what) % len(names)]]
        _, schedule, failure = wander(scenario, int(what))
    else:
        scenario, schedule = SCENARIOS[names[0]], read_schedule(what)
        failure = follow(scenario, schedule)
    for step in World.current.steps:
        print(step)
    print(f"{scenario.name}: {failure.what if failure else 'no invariant is violated'}")
    if failure and what.isdecimal():
        tell(shrink(failure))
    return 1 if failure else 0


def read_schedule(text: str) -> Schedule:
    """A schedule from the form in which it is told: ``12:kill w0,40:fail``."""
    pairs = (entry.split(":", 1) for entry in text.split(",") if entry)
    return {int(number): Fault(*fault.split(" ", 1)) for number, fault in pairs}


def tell(failure: Failure) -> None:
    """Says what a failing walk did, and how to walk it again."""
    steps = failure.steps
    shown = [step for step in steps if step.fault or step.number >= len(steps) - 12]
    schedule = ",".join(f"{number}:{fault}" for number, fault in sorted(failure.schedule.items()))
    print(f"\n{failure.scenario}: {failure.what}", *shown, sep="\n")
    print(f"python -m tests.exploration --scenario {failure.scenario} --replay '{schedule}'", flush=True)


if __name__ == "__main__":
    sys.exit(main())
