"""Publishes a complete run as one commit of a Delta table; publishing it again adds nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from nermill.producer.runs.result import intact
from nermill.producer.sources.files import absolute, filesystem, is_remote
from nermill.worker.contracts.errors import NermillError, StoreError, UsageError
from nermill.worker.contracts.layout import RunFolder, part_name
from nermill.worker.contracts.part import open_part
from nermill.worker.contracts.plan import Plan
from nermill.worker.contracts.schema import ENTITY, metadata_of, part_schema
from nermill.worker.evaluation.blocks import batch_rows

if TYPE_CHECKING:
    from deltalake import DeltaTable

LAYOUTS = ("documents", "entities")
ATTEMPTS = 10  # tries of a commit that fails because other commits changed the table
_COLOURS = re.compile("\x1b\\[[0-9;]*m")
_LOG = "_delta_log"
_RUN_ID = "nermill.run_id"
_ORIGIN = [pa.field("run", pa.string()), pa.field("model", pa.string())]


@dataclass(frozen=True, slots=True)
class Published:
    """The result of publishing a run.

    Attributes:
        table: The table's path or URI.
        version: The table's version that added the rows; None where the table's log does not have it any more.
        rows: Rows that this call added; 0 where the run was in the table already.
        is_new: Whether this call added them.
    """

    table: str
    version: int | None
    rows: int
    is_new: bool


def publish(
    run: RunFolder, plan: Plan, table: str, layout: str = "documents", *, merge_schema: bool = False
) -> Published:
    """Adds a complete run's rows to a Delta table in one commit; the table is created where it does not exist.

    The commit contains the run's id as Delta's application transaction. A table that has this transaction is not
    changed. Of two concurrent calls, Delta's conflict check refuses the second commit. A call that is killed leaves at
    most files that no version of the table refers to, which ``VACUUM`` removes, or a new table without rows.

    Args:
        run: The run's folder.
        plan: Its plan.
        table: Path or URI of the table.
        layout: ``documents``: one row a document, with the part's columns and ``run`` and ``model``; ``entities``: one
            row an entity, with ``run``, ``model``, ``doc_index`` and ``doc_id``.
        merge_schema: Add columns that the table does not have.

    Raises:
        UsageError: deltalake is not installed, the folder holds something else, or the columns differ.
        StoreError: the table cannot be written, or a part cannot be read; no row was added.
    """
    uri = absolute(table)
    schema = _schema(plan, layout)
    options = _storage_options(uri)
    try:
        from deltalake import CommitProperties, Transaction, write_deltalake
        from deltalake.exceptions import CommitFailedError
    except ImportError:
        raise UsageError("nermill publish needs deltalake: pip install 'nermill[delta]'") from None
    properties = CommitProperties(
        custom_metadata={_RUN_ID: plan.run_id, "nermill.run": run.uri},
        app_transactions=[Transaction(_application(plan), 1)],
    )
    for _ in range(ATTEMPTS):
        target = _open(uri, schema, options)
        mode = _schema_mode(target, uri, schema, merge_schema)
        if target.transaction_version(_application(plan)) is not None:
            return Published(uri, _version_of(target, plan), 0, False)
        rows = _Rows(run, plan, layout, schema)
        try:
            reader = pa.RecordBatchReader.from_batches(schema, rows)
            write_deltalake(target, reader, mode="append", schema_mode=mode, commit_properties=properties)
        except CommitFailedError:
            continue  # another commit was first: it may be this very run's
        except Exception as error:
            raise rows.error or _write_error(uri, error) from None
        return Published(uri, _version_of(_open(uri, schema, options), plan), rows.count, True)
    raise StoreError(f"{uri}: other commits changed the table {ATTEMPTS} times before ours; publish again later")


def _application(plan: Plan) -> str:
    """The name of the application transaction that marks a run as published."""
    return f"nermill.run={plan.run_id}"


def _schema(plan: Plan, layout: str) -> pa.Schema:
    """The columns of the rows; all are nullable, so that a table may have more of them or fewer."""
    part = part_schema(keep_text=plan.options.keep_text, keep_fields=plan.options.keep_fields)
    own = [part.field("doc_index"), part.field("doc_id"), *ENTITY] if layout == "entities" else list(part)
    return _nullable(pa.schema([*_ORIGIN, *own]))


def _nullable(schema: pa.Schema) -> pa.Schema:
    def of_type(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_list(kind):
            return pa.list_(of_type(kind.value_type))
        if pa.types.is_struct(kind):
            return pa.struct([pa.field(field.name, of_type(field.type)) for field in kind])
        return kind

    return pa.schema([pa.field(field.name, of_type(field.type)) for field in schema])


def _storage_options(uri: str) -> dict[str, str]:
    """Options that deltalake does not read from the environment: whether the endpoint may use plain HTTP."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    return {"allow_http": "true"} if uri.startswith("s3") and endpoint.startswith("http://") else {}


def _open(uri: str, schema: pa.Schema, options: dict[str, str]) -> DeltaTable:
    """Opens the table, and creates it where the folder is empty or missing.

    Raises:
        UsageError: the folder holds something else.
        StoreError: the folder cannot be read or written.
    """
    from deltalake import DeltaTable

    try:
        if os.path.isfile(uri) or not DeltaTable.is_deltatable(uri, options):
            _check_empty(uri)
            try:
                DeltaTable.create(uri, schema, mode="ignore", storage_options=options)
            except Exception:
                if not DeltaTable.is_deltatable(uri, options):  # unless a concurrent call has created it
                    raise
        return DeltaTable(uri, storage_options=options)
    except NermillError:
        raise
    except Exception as error:
        raise _write_error(uri, error) from None


def _check_empty(uri: str) -> None:
    if not is_remote(uri):
        names = [uri] if os.path.isfile(uri) else os.listdir(uri) if os.path.isdir(uri) else []
    else:
        fs, path = filesystem(uri)
        try:
            names = [str(entry).rstrip("/").rpartition("/")[2] for entry in fs.ls(path, detail=False)]
        except FileNotFoundError:
            names = []
    if set(names) - {_LOG}:
        raise UsageError(f"{uri}: no Delta table, and not empty; name a table, or a folder that is not there yet")


def _schema_mode(table: DeltaTable, uri: str, ours: pa.Schema, merge_schema: bool) -> Any:
    """Value of deltalake's ``schema_mode``: ``merge`` where the columns differ, None where they are the same.

    Raises:
        UsageError: a column of the table has another type, or is missing and ``merge_schema`` is not set.
    """
    arrow: Any = table.schema().to_arrow()
    theirs = _nullable(pa.schema(arrow))
    for field in ours:
        if field.name in theirs.names and theirs.field(field.name).type != field.type:
            difference = f"its column {field.name} is {theirs.field(field.name).type}, the run's is {field.type}"
            raise UsageError(f"{uri}: a table of another schema ({difference}); publish to another table")
    missing = [name for name in ours.names if name not in theirs.names]
    if missing and not merge_schema:
        raise UsageError(
            f"{uri}: a table of another schema (it has no column {', '.join(missing)}); publish to another table, "
            "with the --layout of this one, or add the columns with --merge-schema"
        )
    return "merge" if set(ours.names) != set(theirs.names) else None


class _Rows:
    """The run's rows as a stream of batches.

    Attributes:
        count: Rows so far.
        error: The error that ended the stream; Arrow's stream passes on only its text.
    """

    def __init__(self, run: RunFolder, plan: Plan, layout: str, schema: pa.Schema) -> None:
        self._run, self._plan, self._schema = run, plan, schema
        self._entities = layout == "entities"
        self.count = 0
        self.error: NermillError | None = None

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        try:
            for shard in self._plan.shards:
                for batch in self._part(shard.index):
                    self.count += batch.num_rows
                    yield batch
        except NermillError as error:
            self.error = error
            raise

    def _part(self, shard: int) -> Iterator[pa.RecordBatch]:
        with intact(self._run, part_name(shard)), open_part(self._run, shard) as part:
            origin = {"run": self._plan.run_id, "model": metadata_of(part.schema_arrow).get("model")}
            wanted = ["doc_index", "doc_id", "entities"] if self._entities else self._schema.names
            columns = [column for column in wanted if column in part.schema_arrow.names]
            for batch in part.iter_batches(batch_rows(part), columns=columns, use_threads=self._run.is_local):
                found = _entity_columns(batch) if self._entities else dict(zip(columns, batch.columns, strict=True))
                rows = len(next(iter(found.values())))
                yield pa.record_batch(
                    [
                        found[field.name].cast(field.type)
                        if field.name in found
                        else pa.array([origin.get(field.name)], field.type).take(pa.array([0] * rows, pa.int8()))
                        for field in self._schema
                    ],
                    schema=self._schema,
                )


def _entity_columns(batch: pa.RecordBatch) -> dict[str, pa.Array[Any]]:
    entities = batch["entities"]
    of_document = batch.select(["doc_index", "doc_id"]).take(pc.list_parent_indices(entities))
    values: Any = pc.list_flatten(entities)
    return {
        **{name: of_document[name] for name in of_document.schema.names},
        **{field.name: values.field(field.name) for field in ENTITY},
    }


def _version_of(table: DeltaTable, plan: Plan) -> int | None:
    commits = (commit for commit in table.history() if commit.get(_RUN_ID) == plan.run_id)
    return next((int(commit["version"]) for commit in commits), None)


def _write_error(uri: str, error: Exception) -> StoreError:
    reason = " ".join(_COLOURS.sub("", str(error)).split()) or type(error).__name__
    return StoreError(f"{uri}: deltalake cannot publish there ({reason}); no row was added")
