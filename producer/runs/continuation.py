"""A stream that another process began: what of it is durable, and whether this process may go on with it."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass

from nermill.producer.runs.by_value import find_by_value
from nermill.producer.runs.planning import Request, model_identity, normalised
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.recovery import durable_shards
from nermill.producer.runs.run import open_run
from nermill.producer.sources.files import absolute
from nermill.producer.sources.live import Position
from nermill.worker.contracts.by_value import Documents
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.layout import PLAN_FILE, RunFolder
from nermill.worker.contracts.plan import PLAN_VERSION, Plan, Shard
from nermill.worker.contracts.records import RunState

_ID_LENGTH = 11


@dataclass(frozen=True)
class Durable:
    """What is durable of a stream.

    Attributes:
        shards: Its shards; none where it was killed before the first.
        position: How far they reach in the input; None where there is no shard.
        cuts: How far each shard reaches that was sent after them and is not durable, of a stream by value.
    """

    run: RunFolder
    plan: Plan
    shards: list[Shard]
    position: Position | None
    cuts: tuple[Position, ...] = ()


def followed_run_id(request: Request) -> str:
    """The name of the run of a followed file: a function of the file's path and of what ``planned_run_id`` hashes."""
    model = model_identity(request.model, request.options)
    place = _out(request), absolute(request.inputs[0])
    asked = [PLAN_VERSION, place, model, asdict(request.read), asdict(request.options)]
    if request.by_value:
        asked.append("by value")
    return "s" + hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:_ID_LENGTH]


def find_followed(request: Request, queue: Queue) -> Durable | None:
    """The run of a followed file; None where it is followed for the first time.

    Raises:
        UsageError: it cannot be gone on with.
    """
    run_id = followed_run_id(request)
    uri = f"{_out(request)}/run={run_id}"
    is_known = queue.knows(run_id) if request.by_value else RunFolder(uri).exists(PLAN_FILE)
    return find_durable(uri, request, queue) if is_known else None


def _out(request: Request) -> str:
    return absolute(request.out) if request.by_value else normalised(request.out)


def find_durable(uri: str, request: Request, queue: Queue) -> Durable:
    """What is durable of a stream; waits for as long as a producer that was killed still seems to live.

    Args:
        uri: The run's folder.
        request: Options and model, which must be those that the run was begun with.
        queue: The broker.

    Raises:
        UsageError: there is no such run, it is no stream, was begun with other options, or has a producer.
        StoreError: a shard cannot be read.
    """
    run, plan = _known_to_broker(uri, queue) if request.by_value else open_run(uri)
    if not request.by_value and plan.is_followed_by_ledger:
        raise UsageError(f"{run.uri}: its documents come through the broker; go on with --by-value")
    if not plan.is_stream:
        raise UsageError(f"{run.uri}: not a stream; nermill resume {run.uri} goes on with it")
    asked, begun = asdict(request.options), asdict(plan.options)
    if other := [f"{name} {begun[name]!r}, not {asked[name]!r}" for name in asked if asked[name] != begun[name]]:
        raise UsageError(f"{run.uri}: was begun with {'; '.join(other)}; give the same options, or begin another run")
    model = model_identity(request.model, request.options)
    if request.model is not None and model["sha256"] != plan.model["sha256"]:
        begun_with = plan.model["name"] or "whatever model the workers serve"
        raise UsageError(f"{run.uri}: was begun with {begun_with}, not {request.model}; give the same --model")
    if queue.has_producer(plan.run_id):
        raise UsageError(f"{run.uri}: another producer fills this stream; end that one first")
    if request.by_value:
        return _durable_by_value(run, plan, queue)
    shards, position = durable_shards(run)
    if shards and position is None:
        raise _unplaced(run)
    return Durable(run, plan, shards, position)


def _known_to_broker(uri: str, queue: Queue) -> tuple[RunFolder, Plan]:
    run = RunFolder(absolute(uri))
    found = find_by_value(run.uri, queue)
    if found is None:
        raise UsageError(
            f"{run.uri}: the broker knows no such stream by value; it forgets one that is not filled for seven days. "
            "Send what is not acknowledged as another stream"
        )
    return run, found


def _durable_by_value(run: RunFolder, plan: Plan, queue: Queue) -> Durable:
    with queue.ledger() as ledger:
        documents, state = Documents(ledger), ledger.progress(plan.run_id).state
        if state not in (RunState.OPEN, RunState.CANCELLED):
            raise UsageError(
                f"{run.uri}: ended, and a stream by value does not go on after its end; name another --out"
            )
        shards: list[Shard] = []
        while some := documents.durable(plan.run_id, len(shards)):
            shards += some
        places = documents.positions(plan.run_id)
    try:
        position = Position.of_json(places[len(shards) - 1]) if shards else None
        following = itertools.takewhile(places.__contains__, itertools.count(len(shards)))
        cuts = tuple(Position.of_json(places[index]) for index in following)
    except (KeyError, ValueError, TypeError):
        raise _unplaced(run) from None
    return Durable(run, plan, shards, position, cuts)


def _unplaced(run: RunFolder) -> UsageError:
    return UsageError(f"{run.uri}: does not say how far it reaches in its input; send the rest as another run")
