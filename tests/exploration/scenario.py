"""What there is to do in a world, and by whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LEASE = 12.0
POISON = "poison"  # a document of that text ends the process that tags it
FLAKY = "flaky"  # the model fails on a document of that text until rejects are tried again


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
        retries: Whether rejects are tried again when the run is complete, until there are none.
        cancels: Seconds after which somebody cancels the run; 0 where nobody does.
        resumes: How often somebody else sends the run again and follows it, from the first look at its folder on.
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
    retries: bool = False
    cancels: float = 0.0
    resumes: int = 0
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
        Scenario("retry", documents=("a", FLAKY, "c", "d"), retries=True, **_IN_STEP),
        Scenario("resume", documents=("a", FLAKY, "c", "d"), retries=True, resumes=3, **_IN_STEP),
        Scenario("cancel", seconds=(2.0,) * 4, shard_documents=1, cancels=1.0, **_IN_STEP),
        Scenario("value", by_value=True, **_IN_STEP),
        Scenario("stream", is_stream=True, has_gold=False, **_IN_STEP),
        Scenario("stream-resume", is_stream=True, has_gold=False, resumes=3, **_IN_STEP),
        Scenario("stream-value", is_stream=True, by_value=True, has_gold=False, **_IN_STEP),
        Scenario("threads", workers=1, concurrency=2, documents=("a", "b", "c"), seconds=(1.0,) * 3, shard_documents=1),
    )
}
