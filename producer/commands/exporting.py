"""Commands that write a run's result for other programs: redact, restore, publish, export."""

from __future__ import annotations

from typing import Annotated

import typer

from nermill.producer.commands import options as o
from nermill.producer.commands.request import label_list
from nermill.worker.contracts.errors import UsageError

To = Annotated[str, typer.Option("--to", metavar="FILE", help="A new file: .jsonl, .parquet or .csv.")]


def redact(
    run: o.Run,
    to: To,
    with_: Annotated[
        str,
        typer.Option(
            "--with", metavar="HOW", help="label ([PER]), mask (***), hash (PER_9f2c...) or pseudonym (PER_17)."
        ),
    ] = "label",
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            metavar="FILE",
            help="pseudonym: a new file that restores the texts; hash: file with the secret, created if missing.",
        ),
    ] = None,
    only: Annotated[
        str, typer.Option("--only", metavar="LABELS", help="Labels to replace, as in PER,ORG; default: all.")
    ] = "",
    min_score: Annotated[
        float, typer.Option("--min-score", metavar="SCORE", min=0, max=1, help="Entities with a lower score stay.")
    ] = 0.0,
    json: o.Json = False,
) -> int:
    """Write a complete run's texts with their entities replaced; all other text stays.

    A model misses entities (its recall is below 1), so a redacted text may still contain names; and other text, such
    as a rare disease or a quotation, can identify a person. Measure the recall on your own texts with nermill evaluate,
    and let a person read what must not leak. Ids of documents are written unchanged. The texts of rejected documents
    are left out. The same text with the same label has the same hash or pseudonym in the whole run; with --key and
    pseudonym, nermill restore restores the texts. The file and the key are written completely or not at all.
    """
    from dataclasses import asdict

    from nermill.producer.entities.redact import METHODS
    from nermill.producer.entities.redacted import redact_run
    from nermill.producer.entities.view import print_json
    from nermill.producer.runs.progress import say
    from nermill.producer.runs.result import open_complete

    if with_ not in METHODS:
        raise UsageError(f"--with {with_!r}: one of {', '.join(METHODS)}")
    labels = frozenset(label_list(only))
    folder, plan = open_complete(run)
    done = redact_run(folder, plan, to, with_, key, labels, min_score)
    if done.left_out:
        say(f"the texts of {done.left_out:,} rejected documents are left out: they were not searched for entities")
    if json:
        print_json({"run": folder.uri, "run_id": plan.run_id, "to": to, "with": with_, **asdict(done)})
    else:
        counts = ", ".join(f"{count:,} {label}" for label, count in done.entities.items()) or "no entity"
        print(f"{to}: {done.documents:,} documents, replaced {counts}")
    return 0


def restore(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A file of nermill redact --with pseudonym.", show_default=False)
    ],
    key: Annotated[str, typer.Option("--key", metavar="FILE", help="The key file that was written with it.")],
    to: To,
    json: o.Json = False,
) -> int:
    """Restore the texts of a file with pseudonyms by its key."""
    from nermill.producer.entities.redacted import restore_file
    from nermill.producer.entities.view import print_json

    documents = restore_file(file, key, to)
    if json:
        print_json({"file": file, "to": to, "documents": documents})
    else:
        print(f"{to}: {documents:,} documents")
    return 0


def publish(
    run: o.Run,
    table: Annotated[
        str,
        typer.Argument(
            metavar="TABLE", help="The Delta table's folder or URI; created if missing.", show_default=False
        ),
    ],
    layout: Annotated[
        str,
        typer.Option(
            "--layout", metavar="LAYOUT", help="documents (one row a document) or entities (one row an entity)."
        ),
    ] = "documents",
    merge_schema: Annotated[
        bool, typer.Option("--merge-schema", help="Add columns that the table does not have.")
    ] = False,
    json: o.Json = False,
) -> int:
    """Add a complete run to a Delta table in one commit; repeated calls add it once.

    Needs pip install 'nermill[delta]'. The commit contains the run's id as Delta's application transaction: calls that
    are repeated, killed at any moment, or made at the same time add the rows once.
    """
    from dataclasses import asdict

    from nermill.producer.entities.publish import LAYOUTS
    from nermill.producer.entities.publish import publish as published
    from nermill.producer.entities.view import print_json
    from nermill.producer.runs.result import open_complete

    if layout not in LAYOUTS:
        raise UsageError(f"--layout {layout!r}: one of {', '.join(LAYOUTS)}")
    folder, plan = open_complete(run)
    done = published(folder, plan, table, layout, merge_schema=merge_schema)
    if json:
        print_json({"run": folder.uri, "run_id": plan.run_id, "layout": layout, **asdict(done)})
    elif done.is_new:
        print(f"{done.table}: version {done.version} has {done.rows:,} rows of {folder.uri}")
    else:
        print(f"{done.table}: the rows of {folder.uri} are in it since version {done.version}; nothing to do")
    return 0


def export(
    run: o.Run,
    format_: Annotated[
        str,
        typer.Option("--format", metavar="FORMAT", help="conll (word and tag), jsonl or csv (one row an entity)."),
    ],
    to: Annotated[str, typer.Option("--to", metavar="FILE", help="A new file; default: standard output.")] = "-",
    json: o.Json = False,
) -> int:
    """Write a complete run for annotation tools and for training.

    A corrected CoNLL file of a run over CoNLL input is gold: nermill evaluate RUN --gold FILE. That of a run over texts
    is a new input with gold tags: nermill run FILE --unit document. --json describes the file of --to.
    """
    from nermill.producer.entities.export import FORMATS, export_lines
    from nermill.producer.entities.redacted import new_file
    from nermill.producer.entities.view import print_json
    from nermill.producer.runs.result import open_complete
    from nermill.worker.contracts.store import store_errors

    if format_ not in FORMATS:
        raise UsageError(f"--format {format_!r}: one of {', '.join(FORMATS)}")
    if json and to == "-":
        raise UsageError("--json describes the file that was written; name one with --to")
    folder, plan = open_complete(run)
    lines = export_lines(folder, plan, format_)
    if to == "-":
        for line in lines:
            print(line)
        return 0
    count = 0
    with new_file(to) as aside, open(aside, "w", encoding="utf-8", newline="\n") as stream:
        for line in lines:
            count += 1
            with store_errors("write", to):
                stream.write(line + "\n")
        with store_errors("write", to):
            stream.flush()
    if json:
        print_json({"run": folder.uri, "run_id": plan.run_id, "to": to, "format": format_, "lines": count})
    else:
        print(f"{to}: {count:,} lines")
    return 0
