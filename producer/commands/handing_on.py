"""Commands that hand a run's result on: redact, restore, publish, export."""

from __future__ import annotations

from typing import Annotated

import typer

from nermill.producer.commands import options as o
from nermill.worker.contracts.errors import UsageError


def publish(
    run: o.Run,
    table: Annotated[
        str,
        typer.Argument(
            metavar="TABLE", help="The Delta table's folder or URI; created where none is.", show_default=False
        ),
    ],
    layout: Annotated[
        str,
        typer.Option("--layout", metavar="LAYOUT", help="documents (a row a document) or entities (a row an entity)."),
    ] = "documents",
    merge_schema: Annotated[
        bool, typer.Option("--merge-schema", help="Add columns that the table does not have.")
    ] = False,
    json: o.Json = False,
) -> int:
    """Add a complete run to a Delta table in one commit, exactly once however often it is called.

    Needs pip install 'nermill[delta]'. The commit carries the run's id as Delta's application transaction: a call that
    is repeated, killed at any moment, or made by two at once adds the rows once.
    """
    from dataclasses import asdict

    from nermill.producer.publish import LAYOUTS
    from nermill.producer.publish import publish as published
    from nermill.producer.result import open_complete
    from nermill.producer.view import print_json

    if layout not in LAYOUTS:
        raise UsageError(f"--layout {layout!r}: one of {', '.join(LAYOUTS)}")
    folder, plan = open_complete(run)
    done = published(folder, plan, table, layout, merge_schema=merge_schema)
    if json:
        print_json({"run": folder.uri, "run_id": plan.run_id, "layout": layout, **asdict(done)})
    elif done.is_new:
        print(f"{done.table}: version {done.version} has {done.rows:,} rows of {folder.uri}")
    else:
        print(f"{done.table}: the rows of {folder.uri} are there since version {done.version}; nothing to do")
    return 0
