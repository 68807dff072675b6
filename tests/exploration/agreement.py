"""Whether worlds that seem alike go on alike: the proof by trial of what ``World.signature`` leaves out."""

from __future__ import annotations

import random
from contextlib import suppress

from tests.exploration.scenario import Scenario
from tests.exploration.search import walk
from tests.exploration.world import Actor, Fault, ViolationError, World


def disagreements(scenario: Scenario, seeds: range) -> tuple[int, list[str]]:
    """Walks at random, and compares what comes after worlds of one signature and the same fault, or none.

    Returns:
        How often a world was like one before, and each step after which such worlds were not alike any more.
    """
    after: dict[object, int] = {}
    again, found = 0, list[str]()
    for seed in seeds:
        dice = random.Random(seed)
        rate, most = dice.choice((0.01, 0.02, 0.05)), dice.choice((1, 2, 3))
        before: object = None
        schedule: dict[int, Fault] = {}

        def decide(world: World, actor: Actor) -> Fault | None:
            nonlocal before, again
            signature = world.signature()
            if before is not None:
                again += before in after
                if after.setdefault(before, signature) != signature:
                    steps = ",".join(f"{number}:{fault}" for number, fault in schedule.items())  # noqa: B023
                    found.append(f"{scenario.name}, step {len(world.steps)} of '{steps}': {actor.about} {actor.label}")
            fault = None
            if len(schedule) < most and dice.random() < rate:  # noqa: B023
                fault = schedule[len(world.steps)] = dice.choice(list(world.options(actor)))  # noqa: B023
            before = signature, fault
            return fault

        with suppress(ViolationError):
            walk(scenario, decide, is_noting=True)
    return again, found
