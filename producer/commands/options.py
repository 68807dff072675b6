"""The options of the command line, each defined once: flag, ``NERMILL_*`` environment variable, help."""

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
PriorityOption = Annotated[
    str,
    typer.Option(
        "--priority",
        metavar="LEVEL",
        envvar="NERMILL_PRIORITY",
        help="high, normal or low: shards of a higher priority go first; runs of one priority take turns.",
    ),
]
MaybeBroker = Annotated[
    str,
    typer.Option(
        "--broker",
        metavar="URL",
        help="Let the workers at this broker tag the texts, instead of a model on this machine.",
    ),
]
Json = Annotated[bool, typer.Option("--json", envvar="NERMILL_JSON", help="One JSON object on standard output.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        envvar="NERMILL_FORMAT",
        help="jsonl, json, csv, tsv, parquet, conll or text; default: by suffix and content.",
    ),
]
Unit = Annotated[
    str,
    typer.Option(
        "--unit",
        metavar="UNIT",
        envvar="NERMILL_UNIT",
        help="What a document of a CoNLL file is: sentence, or document (-DOCSTART-, # newdoc).",
    ),
]
IdColumn = Annotated[
    str,
    typer.Option(
        "--id-column", metavar="NAME", envvar="NERMILL_ID_COLUMN", help="Field with the id; without one: path:line."
    ),
]
TextColumn = Annotated[
    str,
    typer.Option(
        "--text-column", metavar="NAME", envvar="NERMILL_TEXT_COLUMN", help="Field with the text, or a list of words."
    ),
]
Delimiter = Annotated[
    str,
    typer.Option(
        "--delimiter",
        metavar="CHAR",
        envvar="NERMILL_DELIMITER",
        help="Between the fields of a CSV: a character, or tab; default: by suffix and header.",
        show_default=False,
    ),
]
WordColumn = Annotated[
    int | None,
    typer.Option(
        "--word-column",
        metavar="N",
        envvar="NERMILL_WORD_COLUMN",
        help="CoNLL: column of the words, from 1, or from the end with -1; default: by content.",
    ),
]
TagColumn = Annotated[
    int | None,
    typer.Option(
        "--tag-column",
        metavar="N",
        envvar="NERMILL_TAG_COLUMN",
        help="CoNLL: column of the tags, from 1, or from the end with -1; default: by content.",
    ),
]
TagNames = Annotated[
    str,
    typer.Option(
        "--tag-names",
        metavar="LIST",
        envvar="NERMILL_TAG_NAMES",
        help="Names of tags that are numbers, in their order: O,B-PER,I-PER,...",
        show_default=False,
    ),
]
OnErrorOption = Annotated[
    str,
    typer.Option(
        "--on-error",
        metavar="WHAT",
        envvar="NERMILL_ON_ERROR",
        help="A record that cannot be read: reject (it alone, named in the rejects) or fail (nothing is written).",
    ),
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
LabelMap = Annotated[
    str,
    typer.Option(
        "--map",
        metavar="LIST",
        envvar="NERMILL_MAP",
        help="New names of labels, of gold's and the model's: person=PER,corporation=ORG; X=O leaves X out.",
        show_default=False,
    ),
]
OnlyLabels = Annotated[
    str,
    typer.Option(
        "--only",
        metavar="LIST",
        envvar="NERMILL_ONLY",
        help="Labels that stay, by their new names: PER,ORG; default: all.",
        show_default=False,
    ),
]
MinScore = Annotated[
    float,
    typer.Option(
        "--min-score", metavar="P", envvar="NERMILL_MIN_SCORE", min=0, max=1, help="Entities below it are left out."
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
