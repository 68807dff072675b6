"""The command that tags texts at once: tag."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Annotated

import typer

from nermill.producer.commands import options as o
from nermill.worker.contracts.errors import UsageError


def tag(
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT]...", help="Texts; default: standard input is the text.", show_default=False),
    ] = None,
    model: o.Model = "demo",
    device: Annotated[
        str, typer.Option("--device", metavar="DEV", help="Where the model runs: cpu, cuda:N or npu:N.")
    ] = "cpu",
    broker: o.MaybeBroker = "",
    lines: Annotated[bool, typer.Option("--lines", help="Standard input: each line is a text.")] = False,
    json: o.Json = False,
) -> int:
    """Mark the entities of a text at once, on this machine or by the workers at a broker (--json: one object a text).

    Offsets count Unicode code points of the text. For many documents, nermill run is faster.
    """

    from nermill.producer.entities.tagging import RemoteTagger, local_tagger

    tagging = nullcontext(RemoteTagger(broker)) if broker else local_tagger(model, device)
    with tagging as tagger:  # the model loads while modules are imported and standard input is read
        from dataclasses import asdict

        from rich.console import Console

        from nermill.producer.entities.show import TaggedDocument
        from nermill.producer.entities.view import print_json, print_marked
        from nermill.producer.runs.progress import say

        given = texts or _standard_input(lines)
        annotations = tagger.tag(given)
    console = Console(highlight=False, emoji=False, markup=False)
    code = 0
    for number, (text, annotation) in enumerate(zip(given, annotations, strict=True), 1):
        status = "rejected" if annotation.fault else "ok"
        entities = [asdict(entity) for entity in annotation.entities]
        if json:
            print_json({"text": text, "status": status, "entities": entities})
        else:
            print_marked(TaggedDocument({"doc_id": "", "status": status, "entities": entities}, text), console)
        if annotation.fault:
            say(f"text {number}: {annotation.fault.reason}: {annotation.fault.message}")
            code = 3
    return code


def _standard_input(lines: bool) -> list[str]:
    """The texts of standard input.

    Raises:
        UsageError: there is no text, or it is not UTF-8.
    """
    if sys.stdin.isatty():
        print("nermill: type a text and end it with Ctrl-D", file=sys.stderr)
    raw = sys.stdin.buffer.read()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input: not UTF-8 (byte {error.start}); convert it with iconv") from None
    found = (
        [line.removesuffix("\r") for line in text.split("\n") if line.strip()] if lines else [text.removesuffix("\n")]
    )
    if not any(text.strip() for text in found):
        raise UsageError("standard input: no text; name one, as in nermill tag 'Ada Lovelace lived in London.'")
    return found
