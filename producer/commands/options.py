"""The command line's options, each described once: flag, ``NERMILL_*`` twin, help."""

from __future__ import annotations

from typing import Annotated

import typer

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT",
        help="Files, folders, globs or URIs (s3://, gs://, ...); - is standard input.",
        show_default=False,
    ),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="The run's folder or URI: OUT/run=<id>.", show_default=False)]
Runs = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", help="The runs' folders or URIs: OUT/run=<id>, OUT/run=*.", show_default=False),
]
Out = Annotated[
    str,
    typer.Option(
        "--out",
        metavar="OUT",
        envvar="NERMILL_OUT",
        help="Folder or URI that holds runs; this one goes to OUT/run=<id>.",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model", metavar="ART", envvar="NERMILL_MODEL", help="Artifact: demo (the bundled model) or a folder."
    ),
]
AnyModel = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="ART", envvar="NERMILL_MODEL", help="Artifact that must tag this run; default: the workers'."
    ),
]
Devices = Annotated[
    str,
    typer.Option(
        "--devices",
        metavar="LIST",
        envvar="NERMILL_DEVICES",
        help="auto, or a list: cpu | cuda:0,cuda:1 | npu:0,npu:1.",
    ),
]
Broker = Annotated[
    str,
    typer.Option(
        "--broker",
        metavar="URL",
        envvar="NERMILL_BROKER_URL",
        help="Broker: redis://, rediss://, redis+socket:// or sentinel://.",
    ),
]
Json = Annotated[bool, typer.Option("--json", envvar="NERMILL_JSON", help="One JSON object on standard output.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        envvar="NERMILL_FORMAT",
        help="jsonl, conll, text, parquet; default: by suffix and content.",
    ),
]
Unit = Annotated[
    str,
    typer.Option(
        "--unit",
        metavar="UNIT",
        envvar="NERMILL_UNIT",
        help="What a document of a CoNLL file is: sentence, or document (-DOCSTART-).",
    ),
]
IdColumn = Annotated[
    str,
    typer.Option(
        "--id-column", metavar="NAME", envvar="NERMILL_ID_COLUMN", help="Field with the id; without one: path:line."
    ),
]
TextColumn = Annotated[
    str, typer.Option("--text-column", metavar="NAME", envvar="NERMILL_TEXT_COLUMN", help="Field with the text.")
]
Lines = Annotated[
    bool, typer.Option("--lines", envvar="NERMILL_LINES", help="Plain text: each line is a document, not each file.")
]
KeepText = Annotated[
    bool, typer.Option("--keep-text", envvar="NERMILL_KEEP_TEXT", help="Write the text into the parts too.")
]
KeepFields = Annotated[
    bool,
    typer.Option("--keep-fields", envvar="NERMILL_KEEP_FIELDS", help="Write the record's other fields too, as JSON."),
]
AggregationOption = Annotated[
    str,
    typer.Option(
        "--aggregation",
        metavar="HOW",
        envvar="NERMILL_AGGREGATION",
        help="Subwords to words: first, average, max, simple or none.",
    ),
]
MaxChars = Annotated[
    int,
    typer.Option(
        "--max-chars",
        metavar="N",
        envvar="NERMILL_MAX_CHARS",
        min=1,
        max=2**31 - 1,
        help="Longer documents are rejected.",
    ),
]
Overlap = Annotated[
    int,
    typer.Option(
        "--overlap",
        metavar="N",
        envvar="NERMILL_OVERLAP",
        min=0,
        max=4096,
        help="Tokens that windows of a long document share.",
    ),
]
ShardDocuments = Annotated[
    int,
    typer.Option(
        "--shard-documents", metavar="N", envvar="NERMILL_SHARD_DOCUMENTS", min=1, help="Most documents of a shard."
    ),
]
HighWater = Annotated[
    int,
    typer.Option(
        "--high-water",
        metavar="N",
        envvar="NERMILL_HIGH_WATER",
        min=1,
        help="Unfinished documents above which sending pauses.",
    ),
]
