"""What holds after every step of every world, and what holds when the work is done."""

from __future__ import annotations

import io
import json
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from nermill.worker.contracts.ledger import CLOSED_SECONDS
from nermill.worker.contracts.message import FINISH, KEY_PREFIX
from nermill.worker.contracts.records import MAX_ATTEMPTS, MAX_STRIKES
from tests.exploration.places import Bucket
from tests.exploration.scenario import FLAKY

if TYPE_CHECKING:
    from tests.exploration.scenario import Scenario
    from tests.exploration.world import Process, World

POISON_DEATHS = MAX_ATTEMPTS + MAX_STRIKES
MIN_RECOVERY_SECONDS = 2.0  # between two looks for lost work


class Watch:
    """The invariants of one world, and what has to be remembered for them."""

    def __init__(self, world: World, scenario: Scenario) -> None:
        self._world, self._scenario = world, scenario
        self._seen = (-1, -1, -1)
        self._parts: dict[str, bytes] = {}
        self._leases: dict[tuple[str, str], tuple[Process, str, float]] = {}
        self._singles: dict[str, str] = {}  # the document that a process tags alone
        self._deaths: Counter[str] = Counter()  # of processes that tagged a document alone
        self._dropped = False
        self._is_unevaluated = False  # too many attempts did not live to write the report
        self.is_compacted = False  # from the begin of the command on
        self.is_retried = False  # likewise
        self.retried = 0  # how often a shard was sent again for its rejects
        self._proved: set[str] = set()  # processes that proved the lease of the last step, and write
        self._is_late = False  # whether a worker may write after a lease ended that it proved before
        self._lost: Counter[tuple[str, str]] = Counter()  # leases that ended while they were held
        self._attempts: dict[tuple[str, str], int] = {}  # of a process's lease of a shard
        self._looked = 0.0
        self._was_cancelled = False
        self.checked_from = 0  # the number of the first step that another walk did not check
        self.sent = 0
        self.tagged: Counter[int] = Counter()
        self.poisoned = 0
        self.evaluations = 0
        world.watch = self

    # What the world tells

    def stepped(self, arguments: list[Any], told: Any) -> None:
        """A step of the ledger took effect."""
        name, now = arguments[0], self._world.now
        actor = self._world.actor
        assert actor is not None
        if name == "lease" and told[0] == "leased":
            run, shard, lease = arguments[1:4]
            held = self._leases.get((run, shard))
            if held and held[2] > now:
                self._world.violated(f"shard {shard} is leased while {held[0].name} holds it")
            if held and held[2] <= now:
                self._lost[run, shard] += 1
            if shard in self._hash(f"run:{run}:results"):
                self._world.violated(f"shard {shard} is leased and recorded")
            if told[1] > 1 + self._lost[run, shard]:
                self._world.violated(
                    f"attempt {told[1]} of shard {shard}, which was lost {self._lost[run, shard]} times"
                )
            self._is_unevaluated |= shard == FINISH and told[1] > MAX_ATTEMPTS
            self._leases[run, shard] = actor.process, lease, now + arguments[6] / 1000
            self._attempts[actor.process.name, shard] = told[1]
            held_shards = [key for key, held in self._leases.items() if held[0] is actor.process and key[1] != FINISH]
            if len(held_shards) > self._scenario.concurrency and not actor.process.is_hindered:
                self._world.violated(f"{actor.process.name} holds {len(held_shards)} shards")
        elif name == "renew" and told:
            run, shard, lease, milliseconds = arguments[1:5]
            held = self._leases.get((run, shard))
            if held is None or held[:2] != (actor.process, lease):
                self._world.violated(f"{actor.process.name} renews a lease of shard {shard} that it does not hold")
            self._leases[run, shard] = actor.process, lease, now + milliseconds / 1000
            if "/finish " in actor.about:
                self._proved.add(actor.process.name)
        elif name in ("release", "complete"):
            key = (arguments[1], arguments[2])
            held = self._leases.get(key)
            if held and held[:2] == (actor.process, arguments[3]):
                del self._leases[key]
            elif name == "release" and told:
                self._world.violated(f"{actor.process.name} releases a lease of shard {key[1]} that it does not hold")
        elif name == "quarantine" and told:
            self._leases.pop((arguments[1], arguments[2]), None)
        elif (name in ("add", "close", "reopen") and told) or (name == "open" and arguments[2] == "open"):
            self._leases.pop((arguments[1], FINISH), None)
            self._proved.discard(actor.process.name)
        elif name == "drop":
            self._leases = {key: held for key, held in self._leases.items() if key[0] != arguments[1]}
        elif name == "expire":
            for (run, shard), (process, _, until) in self._leases.items():
                if until <= now:
                    self._lost[run, shard] += 1
                if until <= now and process.is_alive and not process.is_hindered and not self._dropped:
                    self._world.violated(f"the lease of shard {shard} ended, and {process.name} is well")
            self._leases = {key: held for key, held in self._leases.items() if held[2] > now}

    def memory(self) -> object:
        """What decides whether an invariant will hold, and is in no place of the world."""
        leases = [(key, held[0].slot, held[0].is_alive, *held[1:]) for key, held in sorted(self._leases.items())]
        singles = [(p.slot, self._singles.get(p.name)) for p in self._world.processes if p.is_alive]
        since = round(min(self._world.now - self._looked, MIN_RECOVERY_SECONDS), 6)
        return (
            leases,
            singles,
            sorted(self._deaths.items()),
            sorted(self._lost.items()),
            self._was_cancelled,
            self.is_compacted,
            self.is_retried,
            [process.slot for process in self._world.processes if process.is_alive and process.name in self._proved],
            since,
        )

    def excuses(self) -> tuple[int, ...]:
        """What allows more, the greater each number is: a state that held with less holds with more."""
        hindered = (p.is_hindered for p in self._world.processes if p.is_alive)
        return self.slack(), int(self._is_late), int(self._dropped), int(self._is_unevaluated), *hindered

    def slack(self) -> int:
        """How many shards may be tagged again yet."""
        scenario = self._scenario
        held = scenario.workers * scenario.concurrency  # what a fault may cause to be tagged again
        bound = scenario.shards + self.retried + held * self._world.faults + (POISON_DEATHS if self.poisoned else 0)
        return bound - sum(self.tagged.values())

    def looks(self) -> None:
        """Somebody was allowed to look for lost work."""
        since = self._world.now - self._looked
        if since < MIN_RECOVERY_SECONDS and not self._dropped:
            self._world.violated(f"lost work is looked for again after {since:.1f} s")
        self._looked = self._world.now

    def is_finished(self) -> bool:
        """Whether the ledger says so."""
        return self._hash(f"run:{self._run_id()}").get("state") == "finished"

    def has_leases(self) -> bool:
        """Whether the ledger waits for the end of a lease, of a worker that was lost."""
        return bool(self._hash("leases"))

    def is_blocked(self) -> bool:
        """Whether the ledger says that no live worker can read the run's folder."""
        return "blocked" in self._hash(f"run:{self._run_id()}")

    def befell(self, kind: str, process: Process) -> None:
        """A fault is about to happen at a step of a process."""
        hold = f"{KEY_PREFIX}stream:{self._run_id()}"
        holds = self._scenario.resumes and (hold in self._world.server.values or self._dropped)
        writes = (
            process.name in self._proved
            or any(one.label.startswith("ledger.complete") for one in process.actors)
            or (holds and process.slot == "producer")
        )
        self._is_late |= kind in ("pause", "stall") and writes
        if kind == "drop":
            self._leases.clear()
            self._dropped = True
        affected = self._world.processes if kind == "power" else [process]
        for one in affected:
            if document := self._singles.get(one.name):
                self._deaths[document] += 1
        if kind == "power":
            self._parts = {}

    def annotates(self, process: Process, first: int, rows: int) -> None:
        """A process begins to tag rows of a shard."""
        size = self._scenario.shard_documents
        if rows == 1 < size:
            self._singles[process.name] = str(first)
            return
        self._singles.pop(process.name, None)
        self.tagged[first // size] += 1
        attempts = self._attempts[process.name, str(first // size)]
        if size > 1 and attempts > MAX_ATTEMPTS:
            self._world.violated(f"shard {first // size} is tagged as a whole at attempt {attempts}")

    def attempt(self, process: Process, first: int) -> int:
        """How often the shard of a row was leased when a process was given it."""
        return self._attempts[process.name, str(first // self._scenario.shard_documents)]

    def annotated(self, process: Process) -> None:
        self._singles.pop(process.name, None)

    def poison(self) -> None:
        """A process is about to end by the poison document."""
        self.poisoned += 1
        if self.poisoned > POISON_DEATHS and not self._world.faults:
            self._world.violated(f"the poison document ended {self.poisoned} processes")

    def evaluated(self) -> None:
        """A run is about to be evaluated."""
        self.evaluations += 1
        files = self._files()
        if self._is_excused() or (self.is_retried and self._scenario.resumes):
            return
        if "_SUCCESS" not in files or not self._planned_whole(files) <= files.keys():
            self._world.violated("the run is evaluated and is not whole")

    # After every step

    def check(self) -> None:
        world = self._world
        if len(world.steps) < self.checked_from:
            return
        seen = (world.disk.version, Bucket.version, world.server.version)
        if seen[:2] != self._seen[:2] or self.is_compacted:
            self._check_files()
        if seen[2] != self._seen[2]:
            self._check_ledger()
        if seen != self._seen:
            self._check_agreement()
        self._seen = seen
        if world.violations:
            from tests.exploration.world import ViolationError

            raise ViolationError("; ".join(world.violations))

    def _is_excused(self) -> bool:
        """Whether a late worker may have recorded or marked what is not there any more, as rejects are tried again.

        It proved its lease before, and no store can compare that with what it writes.
        """
        return (self.is_retried or bool(self._scenario.resumes)) and self._is_late

    def _folder(self) -> str:
        """The run's folder, as the place spells it; empty until there is one."""
        if self._scenario.is_disk:
            out = self._world.disk._find(self._scenario.out)
            found = [name for name in (out.entries if out else ()) if name.startswith("run=")]
            return f"{self._scenario.out}/{found[0]}" if found else ""
        out = self._scenario.out.partition("://")[2]
        names = {name.split("/")[2] for name in Bucket.objects if name.startswith(f"{out}/run=")}
        return f"{out}/{min(names)}" if names else ""

    def _run_id(self) -> str:
        return self._folder().rpartition("run=")[2]

    def _files(self) -> dict[str, bytes]:
        if not (folder := self._folder()):
            return {}
        return self._world.disk.files(folder) if self._scenario.is_disk else Bucket.files(folder)

    def _durable(self) -> dict[str, bytes]:
        if not (folder := self._folder()):
            return {}
        return self._world.disk.durable(folder) if self._scenario.is_disk else Bucket.files(folder)

    @staticmethod
    def _planned(files: dict[str, bytes]) -> set[str]:
        return {_part(shard) for shard in _shards(files["_plan.json"])}

    def _planned_whole(self, files: dict[str, bytes]) -> set[str]:
        """Parts of a complete run; not all shards where it was compacted, or is a stream that may be given again."""
        planned, scenario = self._planned(files), self._scenario
        has_all = not (self.is_compacted or (scenario.is_stream and scenario.resumes))
        return planned | set(map(_part, range(scenario.shards))) if has_all else planned

    def _check_compacted(self, files: dict[str, bytes]) -> None:
        """Whoever goes by the plan, or lists the folder and then finds ``_SUCCESS``, reads each document once.

        Until a late worker has taken its part away again, the latter reads that as well.
        """
        wanted = sorted(map(str, range(len(self._scenario.documents))))
        listed = {name for name in files if name.startswith("part-")}
        is_done = "_SUCCESS" in files and all(len(process.actors) <= 1 for process in self._world.processes)
        for how, names in (("plan", self._planned(files)), ("folder", listed if is_done else None)):
            if names is None:
                continue
            if missing := names - files.keys():
                self._world.violated(f"by the {how}, {sorted(missing)} are missing")
                continue
            found = sorted(document for name in names for document, _ in _read(files[name])[0])
            if found != wanted:
                self._world.violated(f"by the {how}, the run has the documents {found}")

    def _check_files(self) -> None:
        violated, files = self._world.violated, self._files()
        if self.is_compacted:
            self._check_compacted(files)
            return
        for name, data in list(self._parts.items()):
            if name not in files and self.is_retried and _rejected(data):
                del self._parts[name]
            elif name not in files:
                violated(f"{name} is gone")
            elif files[name] != data:
                violated(f"{name} changed")
        for name, data in files.items():
            if name.startswith("part-") and name not in self._parts:
                self._parts[name] = data
                self._check_part(name, data)
        if "_plan.json" in files and (lost := _sources(files) - files.keys()):
            violated(f"_plan.json is there, {lost} are not")
        if "_SUCCESS" in files and not self._is_excused():
            durable = self._durable()
            if missing := self._planned_whole(files) - durable.keys():
                violated(f"_SUCCESS is there, {sorted(missing)} are not durable")
            if self._planned(files) != self._planned_whole(files):
                violated("_SUCCESS is there, and _plan.json does not name all shards")
            rejected = [row for name in sorted(self._parts) for row in _rejected(self._parts[name])]
            told = _column(files["_rejects/rejects.parquet"]) if "_rejects/rejects.parquet" in files else []
            if told != rejected:
                violated(f"_SUCCESS is there, rejects.parquet tells of {told} and parts of {rejected}")

    def _check_part(self, name: str, data: bytes) -> None:
        scenario, shard = self._scenario, int(name[5:10])
        try:
            rows, stats = _read(data)
        except Exception as error:
            self._world.violated(f"{name} cannot be read ({error})")
            return
        first = shard * scenario.shard_documents
        wanted = [str(at) for at in range(first, min(first + scenario.shard_documents, len(scenario.documents)))]
        if [name for name, _ in rows] != wanted:
            self._world.violated(f"{name} has the documents {rows}")
        for document, reason in rows:
            is_poison = scenario.documents[int(document)] == "poison"
            is_flaky = scenario.documents[int(document)] == FLAKY and reason in ("model_failure", None)
            if (
                not is_flaky
                and is_poison != (reason is not None)
                and not (reason and self._deaths[document] >= MAX_STRIKES)
            ):
                self._world.violated(f"document {document} is rejected for {reason}")
        rejected = sum(reason is not None for _, reason in rows)
        if (stats["ok"], stats["rejected"], stats["documents"]) != (len(rows) - rejected, rejected, len(rows)):
            self._world.violated(f"{name} says {stats}, and has {len(rows)} rows, {rejected} rejected")

    # The ledger

    def _hash(self, key: str) -> dict[str, Any]:
        return dict(self._world.server.values.get(KEY_PREFIX + key, {}))

    def _runs(self) -> set[str]:
        prefix = f"{KEY_PREFIX}run:"
        return {key[len(prefix) :].partition(":")[0] for key in self._world.server.values if key.startswith(prefix)}

    def _check_ledger(self) -> None:
        violated = self._world.violated
        places: dict[str, set[str]] = {"sent": set(), "leases": set()}
        for run in self._runs():
            header = self._hash(f"run:{run}")
            pending, sent, leases, results, quarantined, shards = (
                self._hash(f"run:{run}:{part}").keys()
                for part in ("pending", "sent", "leases", "results", "quarantined", "shards")
            )
            if "state" not in header:
                violated(f"run {run} has keys and no state")
            for one, other in ((pending, sent), (pending, leases), (sent, leases), (pending, results), (sent, results)):
                if one & other:
                    violated(f"shard {min(one & other)} of {run} is in two places")
            somewhere = pending | sent | leases | results | quarantined
            self._was_cancelled |= header.get("state") == "cancelled"
            documents = self._hash(f"run:{run}:documents").keys()
            taken = documents if self._scenario.by_value else shards  # by value others are declared and wait for theirs
            with_part = {shard for shard in taken if shard == FINISH or _part(int(shard)) in self._parts}
            if self._scenario.resumes:  # a producer that sees all parts ends a run, whatever is recorded
                taken = set() if self.is_retried else taken - with_part
            elif self.is_retried:  # a result is forgotten before its shard is added
                taken = with_part
            if not (self._was_cancelled or taken <= somewhere):
                violated(f"shard {min(taken - somewhere)} of {run} is in no place")
            if stored := documents & results:
                violated(f"the documents of shard {min(stored)} of {run} are in Redis, and it is recorded")
            if header.get("state") == "finishing" and FINISH not in somewhere:
                violated(f"the last step of {run} is in no place")
            waits_or_leased = pending | sent if self._scenario.resumes else pending | sent | leases  # see Ledger.lease
            if header.get("state") == "finished" and FINISH in waits_or_leased:
                violated(f"run {run} is finished, and its last step is not")
            lacking = {shard for shard in shards - results if _part(int(shard)) not in self._parts}
            if header.get("state") == "finishing" and lacking:
                violated(f"run {run} is finishing, shard {min(lacking)} is not recorded")
            is_one_by_one = header.get("artifact") == "" and (sent | leases)
            if pending and not (self._is_enrolled(run) or is_one_by_one or "blocked" in header):
                violated(f"shards of {run} are pending, and nobody will send them")
            places["sent"] |= {f"{run} {shard}" for shard in sent}
            places["leases"] |= {f"{run} {shard}" for shard in leases}
            counts = [tuple(map(int, text.split())) for text in self._hash(f"run:{run}:results").values()]
            for at, name in enumerate(("ok", "rejected", "tokens", "computed")):
                if int(header.get(name, 0)) != sum(count[at] for count in counts):
                    violated(f"run {run} counts {header.get(name)} {name}, its results {counts}")
        for name, members in places.items():
            if self._hash(name).keys() != members:
                violated(f"the index {name} has {sorted(self._hash(name))}, the runs have {sorted(members)}")
        listed: set[str] = set()
        for key, value in self._world.server.values.items():
            if key.startswith(f"{KEY_PREFIX}sent:"):
                listed |= value.keys()
        if listed != places["sent"]:
            violated(f"queues wait for {sorted(listed)}, runs for {sorted(places['sent'])}")

    def _is_enrolled(self, run: str) -> bool:
        values = self._world.server.values.items()
        return any(run in value for key, value in values if key.startswith(f"{KEY_PREFIX}turn:"))

    def _check_agreement(self) -> None:
        """What the ledger says, files that would survive the host's failure prove."""
        violated, run = self._world.violated, self._run_id()
        if not run:
            return
        durable = self._durable()
        if self.is_compacted:
            return
        self._check_documents(run, durable)
        for shard, text in self._hash(f"run:{run}:results").items():
            if shard == FINISH:
                continue
            name = _part(int(shard))
            was_removed = self.is_retried and name not in self._parts  # and is recorded until that is said
            if self._is_excused() or was_removed:
                continue
            if name not in durable:
                violated(f"shard {shard} is recorded, its part is not durable")
                continue
            _, stats = _read(durable[name])
            told = (stats["ok"], stats["rejected"], stats["tokens"], stats["computed_tokens"])
            if tuple(map(int, text.split())) != told:
                violated(f"shard {shard} is recorded with {text}, its part says {told}")
        is_finished = self._hash(f"run:{run}").get("state") == "finished"
        is_unmarked = is_finished and "_SUCCESS" not in durable
        if is_unmarked and not (self._scenario.is_stream or self._is_excused()):  # a stream may go on after its end
            violated("the run is finished, and _SUCCESS is not durable")

    def _check_documents(self, run: str, durable: dict[str, bytes]) -> None:
        """What the ledger knows is in the run's folder with all that the plan names, or by value still in Redis."""
        known = self._hash(f"run:{run}:shards").keys()
        if self._scenario.by_value:  # what is only declared waits for its documents
            parts = ("pending", "sent", "leases", "results")
            known &= {shard for part in parts for shard in self._hash(f"run:{run}:{part}")}
        stored = {_source(int(shard)) for shard in known - self._hash(f"run:{run}:documents").keys()}
        if stored and (missing := {"_plan.json", *_sources(durable), *stored} - durable.keys()):
            self._world.violated(f"the ledger knows the run, and {sorted(missing)} are not durable")

    # When the work is done

    def check_end(self) -> None:
        violated, world, scenario = self._world.violated, self._world, self._scenario
        files = self._files()
        ends = {self._hash(f"run:{run}").get("state") for run in self._runs()}
        is_cancelled = json.loads(files.get("_plan.json", b"{}")).get("cancelled") and ends <= {"cancelled"}
        if scenario.cancels and not any(step.fault for step in world.steps) and not is_cancelled:
            violated(f"somebody cancelled the run, and it is {ends}")
        if is_cancelled:
            wanted = set()
        else:
            shards = self._planned(files) if self.is_compacted else set(map(_part, range(scenario.shards)))
            has_report = scenario.has_gold and not self._is_unevaluated
            wanted = {"_SUCCESS", *shards} | ({"_report.json", "_report.html"} if has_report else set())
        if not wanted <= files.keys():
            violated(f"the work is done, and the run has {sorted(files)}")
        if not ends <= ({"finished", "cancelled"} if scenario.cancels else {"finished"}):
            violated(f"the work is done, and the run is {ends}")
        for run in self._runs():
            keys = [key for key in world.server.values if f":{run}" in key and "run:" in key]
            if missing := [key for key in keys if key not in world.server.deadlines]:
                violated(f"the work is done, and {missing} stay for ever")
            if max((world.server.deadlines.get(key, 0.0) for key in keys), default=0.0) > world.now + CLOSED_SECONDS:
                violated(f"the work is done, and the run stays for more than {CLOSED_SECONDS} s")
        for key, value in world.server.values.items():
            is_index = key.startswith(tuple(KEY_PREFIX + name for name in ("turn:", "sent", "leases")))
            if is_index and value:
                violated(f"the work is done, and {key} has {sorted(value)}")
        if (
            scenario.retries
            and not self._is_late
            and (rejected := [row for data in self._parts.values() for row in _rejected(data)])
        ):
            violated(f"rejects were tried again, and {rejected} are rejected")
        is_plain = not (self.poisoned or scenario.blind or scenario.cancels or scenario.retries)
        if is_plain and not any(step.fault for step in world.steps):
            if self.tagged != Counter(range(scenario.shards)):
                violated(f"without faults, shards were tagged so often: {dict(self.tagged)}")
            if self.sent != scenario.shards + 1:
                violated(f"without faults, {self.sent} messages were sent")
        if self.slack() < 0:
            violated(f"with {world.faults} faults, shards were tagged so often: {dict(self.tagged)}")
        self.check()


def _part(shard: int) -> str:
    return f"part-{shard:05d}.parquet"


def _source(shard: int) -> str:
    return f"_shards/shard-{shard:05d}.arrow"


@cache
def _shards(plan: bytes) -> list[int]:
    return [shard["index"] for shard in json.loads(plan)["shards"]]


def _sources(files: dict[str, bytes]) -> set[str]:
    if "_plan.json" not in files:
        return set()
    return {_source(shard) for shard in _shards(files["_plan.json"])}


@cache
def _read(data: bytes) -> tuple[list[tuple[str, str | None]], dict[str, Any]]:
    """Documents and reject reasons of a part, and what it says of itself."""
    with pq.ParquetFile(io.BytesIO(data)) as part:
        table = part.read(["doc_id", "reject_reason"], use_threads=False)
        stats = json.loads(part.schema_arrow.metadata[b"nermill.stats"])
    return list(zip(table["doc_id"].to_pylist(), table["reject_reason"].to_pylist(), strict=True)), stats


def _rejected(data: bytes) -> list[str]:
    return [document for document, reason in _read(data)[0] if reason is not None]


@cache
def _column(data: bytes) -> list[str]:
    with pq.ParquetFile(io.BytesIO(data)) as file:
        return list(file.read(["doc_id"], use_threads=False)["doc_id"].to_pylist())
