"""``_plan.json``: what a run was asked to do, enough to resume it without the broker."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.layout import FIRST_LAYOUT, PLAN_FILE, RunFolder

PLAN_VERSION = 2
RUN_ID = re.compile(r"[0-9a-z][0-9a-z_-]{0,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")
BY_VALUE = "by_value"  # in a plan's details
AGGREGATIONS = ("none", "simple", "first", "average", "max")

Priority = Literal["high", "normal", "low"]
Aggregation = Literal["none", "simple", "first", "average", "max"]


@dataclass(frozen=True, slots=True)
class Options:
    """How a run's documents are tagged; part of the run's identity.

    Attributes:
        aggregation: How subword predictions become a word's: names and meaning as in transformers.
        overlap: Tokens that neighbouring windows of a long document share.
        max_chars: Longest document in code points; a longer one is rejected.
        keep_text: Whether parts carry the text.
        keep_fields: Whether parts carry the record's other fields, as JSON.
        map: New names of labels, gold's and the model's; ``O`` leaves a label out.
        only: Labels that stay, by their new names; empty for all.
        min_score: Entities below this score, in [0, 1], are left out.
    """

    aggregation: Aggregation = "first"
    overlap: int = 64
    max_chars: int = 1_000_000
    keep_text: bool = False
    keep_fields: bool = False
    map: dict[str, str] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    min_score: float = 0.0


@dataclass(frozen=True, slots=True)
class Input:
    """One input file: where, what, and how to know it again. ``sha256`` is empty for a stream."""

    uri: str
    format: str
    bytes: int
    sha256: str
    documents: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A run's unit of work: ``documents`` consecutive documents from ``first`` on, in one ``_shards`` file."""

    index: int
    first: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        run_id: Name of the run, derived from its inputs, options and model.
        created: UTC time, ISO 8601.
        model: The artifact that was asked for: name or path, and its sha256 where the producer could see it.
        unit: What a document is: ``sentence`` or ``document`` for CoNLL, else ``document``.
        has_gold: Whether any document carries gold tags.
        is_open: A stream that still grows; its shards are those in ``_shards``.
        cancelled: The run was cancelled; what is committed stays.
        priority: Whose shards go first.
    """

    run_id: str
    created: str
    model: dict[str, str]
    options: Options
    inputs: tuple[Input, ...]
    shards: tuple[Shard, ...]
    unit: str = "document"
    has_gold: bool = False
    is_open: bool = False
    cancelled: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    priority: Priority = "normal"

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def by_value(self) -> bool:
        """Whether the documents came through the broker; the plan in the folder is open until all are tagged."""
        return self.details.get(BY_VALUE) is True

    @property
    def is_stream(self) -> bool:
        """Whether the documents came one by one, from an input that was not known before."""
        return len(self.inputs) == 1 and not self.inputs[0].sha256

    @property
    def is_followed_by_ledger(self) -> bool:
        """Whether the ledger alone tells how far the run is, since workers have not written all of it."""
        return self.by_value and self.is_open

    def write(self, run: RunFolder) -> None:
        run.write(PLAN_FILE, (plan_json(self, indent=1) + "\n").encode())

    def closed(self, shards: Iterable[Shard]) -> Plan:
        """The plan of a run that was open, with all its shards."""
        closed = replace(self, shards=tuple(shards), is_open=False, cancelled=False)
        if not self.is_stream:
            return closed
        return replace(closed, inputs=(replace(self.inputs[0], documents=closed.documents),))

    def cancel(self, run: RunFolder) -> Plan:
        """Marks the run cancelled, durably."""
        cancelled = replace(self, cancelled=True)
        cancelled.write(run)
        return cancelled


def read_plan(run: RunFolder) -> Plan:
    """Reads a run's plan.

    Raises:
        UsageError: there is no run, or its plan is damaged or from another version.
    """
    if not run.exists(PLAN_FILE):
        if run.exists(FIRST_LAYOUT):
            raise UsageError(
                f"{run.uri}: made by an earlier nermill ({FIRST_LAYOUT}, plan version 1), this one reads version "
                f"{PLAN_VERSION}; submit its input again (the same --out is fine), or keep that nermill to read it"
            )
        raise UsageError(
            f"{run.uri}: no run here ({PLAN_FILE} is missing); name a folder OUT/run=<id> that nermill made"
        )
    try:
        body = json.loads(run.read(PLAN_FILE))
        version = body["plan_version"]
        if version != PLAN_VERSION:
            raise UsageError(f"{run.path(PLAN_FILE)}: plan version {version!r}, this nermill reads {PLAN_VERSION}")
        return plan_from(body)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{run.path(PLAN_FILE)}: not a plan ({error})") from None


def plan_json(plan: Plan, *, indent: int | None = None) -> str:
    """A plan as JSON, its version included."""
    return json.dumps({"plan_version": PLAN_VERSION, **asdict(plan)}, indent=indent, ensure_ascii=False)


def plan_from(body: dict[str, Any]) -> Plan:
    """A plan from JSON.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is none of this version.
    """
    body = dict(body)
    if body.pop("plan_version") != PLAN_VERSION:
        raise ValueError(f"its version is not {PLAN_VERSION}")
    body["options"] = options_from(body["options"])
    body["inputs"] = tuple(Input(**entry) for entry in body["inputs"])
    body["shards"] = tuple(Shard(**entry) for entry in body["shards"])
    plan = Plan(**body)
    if plan.priority not in get_args(Priority):
        raise ValueError(f"priority {plan.priority!r}")
    if not isinstance(plan.details, dict):
        raise ValueError("details")
    return plan


def options_from(body: dict[str, Any]) -> Options:
    """Options from untrusted JSON.

    Raises:
        ValueError: a name, type or value that does not fit.
    """
    defaults = Options()
    if not isinstance(body, dict) or (unknown := body.keys() - {f.name for f in fields(Options)}):
        raise ValueError(f"unknown options {sorted(unknown) if isinstance(body, dict) else body!r}")
    body = {name: tuple(value) if isinstance(value, list) else value for name, value in body.items()}
    for name, value in body.items():
        if type(value) is not type(getattr(defaults, name)):
            raise ValueError(f"option {name}={value!r} has the wrong type")
    options = replace(defaults, **body)
    if options.aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation {options.aggregation!r} is none of {', '.join(AGGREGATIONS)}")
    if not 0 <= options.overlap <= 4096 or not 0 < options.max_chars <= 2**31 - 1:
        raise ValueError("overlap or max_chars out of range")
    if not all(isinstance(text, str) and text for text in (*options.map, *options.map.values(), *options.only)):
        raise ValueError("map or only names no label")
    if not 0 <= options.min_score <= 1:
        raise ValueError("min_score out of range")
    return options
