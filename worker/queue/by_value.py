"""Documents by value: a worker brings them, and the run's plan, from the ledger into the run's folder."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pyarrow as pa

from nermill.worker.contracts.by_value import Documents
from nermill.worker.contracts.errors import LeaseLostError, MessageError
from nermill.worker.contracts.layout import PLAN_FILE, RunFolder
from nermill.worker.contracts.ledger import Claim
from nermill.worker.contracts.plan import Plan, Shard, plan_json, read_plan
from nermill.worker.contracts.shard import encode_shard, read_shard


def store(claim: Claim, shard: Shard, documents: Documents) -> pa.Table:
    """Writes a shard's documents into the run's folder, and the plan where there is none, and removes them from Redis.

    No file is replaced: a shard or a plan that is there stays, and is refused where it is another one.

    Returns:
        The documents, with the SHARD schema.

    Raises:
        MessageError: the ledger's entries do not fit, or the folder holds another run or other documents.
        StoreError: the store does not take the files.
        LeaseLostError: another worker has the shard.
    """
    run = claim.folder
    table = documents.take(claim, shard)
    _ensure_plan(run, claim, shard, documents)
    data, sha256 = encode_shard(table)
    name = run.shard_file(shard.index)
    if not run.write(name, data, exclusive=True):
        there = run.read(name)
        sha256 = hashlib.sha256(there).hexdigest()
        if there != data and not read_shard(run, shard.index, sha256).equals(table):  # another Arrow, other bytes
            raise MessageError(
                f"{run.path(name)}: holds other documents than those that were sent, and is not replaced; "
                "remove it, or name another --out, and submit the input again"
            )
    if not documents.stored(claim, replace(shard, sha256=sha256)):
        raise LeaseLostError
    return table


def _ensure_plan(run: RunFolder, claim: Claim, shard: Shard, documents: Documents) -> None:
    if run.exists(PLAN_FILE):
        plan = read_plan(run)
        if not plan.by_value or plan.run_id != claim.run_id:
            raise MessageError(f"{run.uri}: holds another run, which was not submitted by value")
        if not plan.is_open and (shard.index, shard.first, shard.documents) not in {
            (planned.index, planned.first, planned.documents) for planned in plan.shards
        }:
            raise MessageError(f"{run.uri}: its plan is closed and has no such shard {shard.index}")
        return
    given = documents.plan(claim.run_id)
    if given is None or given.run_id != claim.run_id or given.options != claim.options or not given.by_value:
        raise MessageError(f"run {claim.run_id}: the ledger's plan is not this run's")
    if run.uri.rpartition("/")[2] != f"run={claim.run_id}":
        raise MessageError(f"{run.uri!r}: a run by value lies in a folder run={claim.run_id}")
    opened = replace(given, shards=(), is_open=True, cancelled=False)
    run.write(PLAN_FILE, f"{plan_json(opened, indent=1)}\n".encode(), exclusive=True)


def close_plan(run: RunFolder, plan: Plan, documents: Documents) -> Plan:
    """The plan of a run by value whose shards are all recorded; an open one is closed in the run's folder.

    Raises:
        MessageError: the ledger's shards do not fit.
        StoreError: the plan cannot be written.
    """
    if plan.is_open:
        plan = replace(plan, shards=documents.shards(plan.run_id), is_open=False, cancelled=False)
        plan.write(run)
    return plan
