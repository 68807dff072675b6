"""What ``run``, ``plan`` and ``submit`` have in common: inputs and options that make a Request."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, get_args

from nermill.producer.commands import options as o
from nermill.worker.contracts.errors import UsageError

if TYPE_CHECKING:
    from nermill.producer.planning import Request


def takes_request(command: Callable[..., int]) -> Callable[..., int]:
    """Gives a command the parameters of ``make_request``; it is called with their Request first."""
    shared = inspect.signature(make_request).parameters
    own = dict(list(inspect.signature(command).parameters.items())[1:])

    @wraps(command)
    def wrapper(**values: Any) -> int:
        given = {name: values.pop(name) for name in shared if name not in own}
        for name in shared.keys() & own.keys():
            given[name] = values[name]
        return command(make_request(**given), **values)

    hints = {**_hints(make_request), **_hints(command)}
    parameters = {**shared, **own}
    required = [p for p in parameters.values() if p.default is p.empty]
    optional = [p for p in parameters.values() if p.default is not p.empty]
    signature = inspect.Signature([p.replace(annotation=hints[p.name]) for p in required + optional])
    wrapper.__signature__ = signature  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return wrapper


def make_request(
    inputs: o.Inputs,
    out: o.Out,
    model: o.AnyModel = None,
    format_: o.Format = None,
    unit: o.Unit = "sentence",
    id_column: o.IdColumn = "id",
    text_column: o.TextColumn = "text",
    lines: o.Lines = False,
    keep_text: o.KeepText = False,
    keep_fields: o.KeepFields = False,
    aggregation: o.AggregationOption = "first",
    max_chars: o.MaxChars = 1_000_000,
    overlap: o.Overlap = 64,
    shard_documents: o.ShardDocuments = 1024,
) -> Request:
    """The request that the options describe.

    Raises:
        UsageError: a value that an option does not have.
    """
    from nermill.producer.planning import Request
    from nermill.producer.shards import ShardLimits
    from nermill.producer.sources import Format, ReadOptions, Unit
    from nermill.worker.contracts.plan import Aggregation, Options

    _check("--format", format_, (None, *get_args(Format)))
    _check("--unit", unit, get_args(Unit))
    _check("--aggregation", aggregation, get_args(Aggregation))
    return Request(
        inputs=tuple(inputs),
        out=out,
        model=model,
        read=ReadOptions(format_, unit, id_column, text_column, keep_fields, lines),  # type: ignore[arg-type]
        options=Options(aggregation, overlap, max_chars, keep_text, keep_fields),  # type: ignore[arg-type]
        limits=ShardLimits(documents=shard_documents),
    )


def _check(flag: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{flag} {value!r}: one of {', '.join(name for name in allowed if name)}")


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    # Request is known to type checkers alone: importing it would bring in pyarrow. Not get_type_hints, which
    # on Python 3.10 wraps a parameter with default None in an Optional that hides its Annotated.
    return inspect.get_annotations(function, eval_str=True, locals={"Request": Any})
