"""``nermill``: the producer's command line; an error is one line on standard error and a documented exit code."""

from __future__ import annotations

import io
import signal
import sys
from functools import partial
from typing import Annotated

import typer

from nermill.producer.commands import exporting, following, reading, submitting, tagging
from nermill.producer.commands.request import RequestCommand
from nermill.worker.contracts.console import exit_code

app = typer.Typer(
    name="nermill",
    help="Batch named entity recognition: documents go into a queue, workers tag them, the result is Parquet tables.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command, example in (
    (submitting.run, "nermill run reports/*.jsonl --out tagged"),
    (submitting.submit, "nermill submit s3://news/2024/ --out s3://news/tagged --wait"),
    (submitting.plan, "nermill plan reports/*.jsonl --out tagged"),
    (tagging.tag, "nermill tag 'Ada Lovelace met Charles Babbage in London.'"),
    (following.status, "nermill status tagged/run=3f2a91c07b55 --watch"),
    (following.list_, "nermill list tagged"),
    (following.resume, "nermill resume tagged/run=3f2a91c07b55 --wait"),
    (following.rejects, "nermill rejects tagged/run=3f2a91c07b55 --json"),
    (following.cancel, "nermill cancel tagged/run=3f2a91c07b55"),
    (reading.evaluate, "nermill evaluate tagged/run=3f2a91c07b55 --min-f1 0.9"),
    (reading.compact, "nermill compact tagged/run=3f2a91c07b55"),
    (exporting.export, "nermill export tagged/run=3f2a91c07b55 --format conll --to corrected.conll"),
    (exporting.redact, "nermill redact tagged/run=3f2a91c07b55 --to redacted.jsonl --with pseudonym --key names.key"),
    (exporting.restore, "nermill restore redacted.jsonl --key names.key --to restored.jsonl"),
    (exporting.publish, "nermill publish tagged/run=3f2a91c07b55 s3://lake/entities --layout entities"),
    (reading.doctor, "nermill doctor --broker redis://queue:6379/0 --devices npu:0,npu:1"),
    (reading.show, "nermill show tagged/run=3f2a91c07b55 --limit 5"),
):
    summary = (command.__doc__ or "").partition("\n")[0]  # click would truncate it
    name = command.__name__.rstrip("_")
    kind = RequestCommand if command in (submitting.run, submitting.submit, submitting.plan) else None
    app.command(name, cls=kind, short_help=summary, epilog=f"Example: {example}")(command)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        from importlib.metadata import version as version_of

        print(f"nermill {version_of('nermill')}")
        raise typer.Exit


def main() -> None:
    """Entry point of ``nermill``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for terminals without Unicode
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that child processes are stopped in order
    sys.exit(
        exit_code(
            "nermill", partial(app, sys.argv[1:] or ["--help"], standalone_mode=False, prog_name="nermill"), typer.Abort
        )
    )


if __name__ == "__main__":
    main()
