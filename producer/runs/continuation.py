"""A stream that another process began: what of it is durable, and whether this process may go on with it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from nermill.producer.runs.planning import Request, model_identity, normalised
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.recovery import durable_shards
from nermill.producer.runs.run import open_run
from nermill.producer.sources.files import absolute
from nermill.producer.sources.live import Position
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.layout import PLAN_FILE, RunFolder
from nermill.worker.contracts.plan import PLAN_VERSION, Plan, Shard

_ID_LENGTH = 11


@dataclass(frozen=True)
class Durable:
    """What is durable of a stream.

    Attributes:
        shards: Its shards; none where it was killed before the first.
        position: How far they reach in the input; None where there is no shard.
    """

    run: RunFolder
    plan: Plan
    shards: list[Shard]
    position: Position | None


def followed_run_id(request: Request) -> str:
    """The name of the run of a followed file: a function of the file's path and of what ``planned_run_id`` hashes."""
    model = model_identity(request.model, request.options)
    place = normalised(request.out), absolute(request.inputs[0])
    asked = [PLAN_VERSION, place, model, asdict(request.read), asdict(request.options)]
    return "s" + hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:_ID_LENGTH]


def find_followed(request: Request, queue: Queue) -> Durable | None:
    """The run of a followed file; None where it is followed for the first time.

    Raises:
        UsageError: it cannot be gone on with.
    """
    uri = f"{normalised(request.out)}/run={followed_run_id(request)}"
    return find_durable(uri, request, queue) if RunFolder(uri).exists(PLAN_FILE) else None


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
    run, plan = open_run(uri)
    if len(plan.inputs) != 1 or plan.inputs[0].sha256:
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
    shards, position = durable_shards(run)
    if shards and position is None:
        raise UsageError(f"{run.uri}: does not say how far it reaches in its input; send the rest as another run")
    return Durable(run, plan, shards, position)
