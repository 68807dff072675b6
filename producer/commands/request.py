"""The parameters that ``run``, ``plan`` and ``submit`` share: inputs and options, which make a Request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import typer
from typer.core import TyperCommand

from nermill.producer.commands import options as o
from nermill.worker.contracts.errors import UsageError


class RequestCommand(TyperCommand):
    """A command with the options of ``make_request`` beside its own; it finds the Request in ``ctx.obj``.

    Typer reads the options of a command from one function. Where both have an option of one name, it is the command's:
    its default and help apply, and its value goes to both.
    """

    def __init__(self, name: str | None, *, params: list[Any], **settings: Any) -> None:
        self._own = {param.name: param for param in params}
        self._shared = {param.name: param for param in _options_of(make_request)}
        super().__init__(name, params=list((self._shared | self._own).values()), **settings)

    def invoke(self, ctx: Any) -> Any:
        given = ctx.params
        ctx.obj = make_request(**{name: given[name] for name in self._shared})
        ctx.params = {name: given[name] for name in self._own}
        return super().invoke(ctx)


def _options_of(function: Callable[..., Any]) -> list[Any]:
    """The options and arguments that Typer makes of a function's parameters."""
    app = typer.Typer(add_completion=False)
    app.command()(function)
    return typer.main.get_command(app).params


def make_request(
    inputs: o.Inputs,
    out: o.Out,
    model: o.AnyModel = None,
    format_: o.Format = None,
    unit: o.Unit = "sentence",
    id_column: o.IdColumn = "id",
    text_column: o.TextColumn = "text",
    delimiter: o.Delimiter = "",
    word_column: o.WordColumn = None,
    tag_column: o.TagColumn = None,
    tag_names: o.TagNames = "",
    lines: o.Lines = False,
    on_error: o.OnErrorOption = "reject",
    keep_text: o.KeepText = False,
    keep_fields: o.KeepFields = False,
    label_map: o.LabelMap = "",
    only: o.OnlyLabels = "",
    min_score: o.MinScore = 0.0,
    aggregation: o.AggregationOption = "first",
    max_chars: o.MaxChars = 1_000_000,
    overlap: o.Overlap = 64,
    shard_documents: o.ShardDocuments = 1024,
    priority: o.PriorityOption = "normal",
) -> Any:
    """The Request that the options describe; Typer would evaluate its name here, and import pyarrow at each start.

    Raises:
        UsageError: an option has an invalid value.
    """
    from nermill.producer.runs.planning import Request
    from nermill.producer.runs.shards import ShardLimits
    from nermill.producer.sources import Format, OnError, ReadOptions, Unit
    from nermill.worker.contracts.plan import Aggregation, Options, Priority

    _check("--format", format_, (None, *get_args(Format)))
    _check("--unit", unit, get_args(Unit))
    _check("--on-error", on_error, get_args(OnError))
    _check("--aggregation", aggregation, get_args(Aggregation))
    _check("--priority", priority, get_args(Priority))
    return Request(
        inputs=tuple(inputs),
        out=out,
        model=model,
        read=ReadOptions(
            format=format_,  # type: ignore[arg-type]
            unit=unit,  # type: ignore[arg-type]
            id_column=id_column,
            text_column=text_column,
            keep_fields=keep_fields,
            lines=lines,
            on_error=on_error,  # type: ignore[arg-type]
            delimiter=_delimiter(delimiter),
            word_column=column("--word-column", word_column),
            tag_column=column("--tag-column", tag_column),
            tag_names=_tag_names(tag_names),
        ),
        options=Options(
            aggregation=aggregation,  # type: ignore[arg-type]
            overlap=overlap,
            max_chars=max_chars,
            keep_text=keep_text,
            keep_fields=keep_fields,
            map=mapping(label_map),
            only=label_list(only),
            min_score=min_score,
        ),
        limits=ShardLimits(documents=shard_documents),
        priority=priority,  # type: ignore[arg-type]
    )


def _check(flag: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{flag} {value!r}: one of {', '.join(name for name in allowed if name)}")


def column(flag: str, number: int | None) -> int | None:
    """Checks the number of a CoNLL column and returns it.

    Raises:
        UsageError: the number is 0.
    """
    if number == 0:
        raise UsageError(f"{flag} 0: columns count from 1, or back from -1")
    return number


def mapping(value: str) -> dict[str, str]:
    """New names by label, from the value of ``--map``.

    Raises:
        UsageError: an entry is not FROM=TO, or a label has two new names.
    """
    names: dict[str, str] = {}
    for entry in _entries(value):
        label, equals, name = (piece.strip() for piece in entry.partition("="))
        if not equals or not label or not name:
            raise UsageError(f"--map {value!r}: {entry.strip()!r} is not FROM=TO; write person=PER,corporation=ORG")
        if names.setdefault(label, name) != name:
            raise UsageError(f"--map {value!r}: {label} is given two names, {names[label]} and {name}")
    return names


def label_list(value: str) -> tuple[str, ...]:
    """The labels of ``--only``.

    Raises:
        UsageError: an entry is empty.
    """
    labels = tuple(entry.strip() for entry in _entries(value))
    if not all(labels):
        raise UsageError(f"--only {value!r}: an empty label; write PER,ORG")
    return labels


def _entries(value: str) -> list[str]:
    return value.split(",") if value else []


def _delimiter(value: str) -> str:
    value = {"tab": "\t", "\\t": "\t"}.get(value, value)
    if len(value) > 1 or value in ('"', "\n", "\r"):
        raise UsageError(f"--delimiter {value!r}: one character, such as ';', or tab")
    return value


def _tag_names(value: str) -> tuple[str, ...]:
    from nermill.worker.contracts.tags import is_tag

    names = tuple(name.strip() for name in value.split(",")) if value else ()
    for name in names:
        if not is_tag(name):
            raise UsageError(f"--tag-names {value!r}: {name!r} is no tag; name them in order: O,B-PER,I-PER,...")
    return names
