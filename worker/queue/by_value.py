"""Documents by value: a worker brings them, and the run's plan, from the ledger into the run's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa

from nermill.worker.contracts.by_value import Documents
from nermill.worker.contracts.errors import LeaseLostError, MessageError, UnreachableError, UsageError
from nermill.worker.contracts.layout import PLAN_FILE, RunFolder
from nermill.worker.contracts.plan import Plan, Shard, plan_json, read_plan
from nermill.worker.contracts.records import Claim
from nermill.worker.contracts.shard import encode_shard, read_shard
from nermill.worker.queue.leases import Leases

Patiently = Callable[[Callable[[], Any]], Any]


def store(claim: Claim, shard: Shard, documents: Documents, patiently: Patiently) -> pa.Table:
    """Writes a shard's documents into the run's folder, and the plan where there is none, and removes them from Redis.

    No file is replaced: a shard or a plan that is there stays, and is refused where it is another one.

    Args:
        claim: The lease.
        shard: Its entry in the ledger.
        documents: The ledger's steps.
        patiently: Makes one call of the ledger, again while that does not answer; each may be repeated.

    Returns:
        The documents, with the SHARD schema.

    Raises:
        MessageError: the ledger's entries do not fit, or the folder holds another run or other documents.
        StoreError: the store does not take the files.
        LeaseLostError: the lease ended.
    """
    run = claim.folder
    table: pa.Table = patiently(lambda: documents.take(claim, shard))
    if run.exists(PLAN_FILE):
        _check_plan(run, claim, shard)
    else:
        _write_plan(run, claim, patiently(lambda: documents.plan(claim.run_id)))
    data, sha256 = encode_shard(table)
    name = run.shard_file(shard.index)
    if not run.write(name, data, exclusive=True):
        there = run.read(name)
        sha256 = hashlib.sha256(there).hexdigest()
        if there != data and not _holds(run, shard.index, sha256, table):
            raise MessageError(
                f"{run.path(name)}: holds other documents than those that were sent, and is not replaced; "
                "remove it, or name another --out, and submit the input again"
            )
    if not patiently(lambda: documents.stored(claim, replace(shard, sha256=sha256))):
        raise LeaseLostError
    return table


def _holds(run: RunFolder, shard: int, sha256: str, table: pa.Table) -> bool:
    """Whether a shard's file has these documents; another version of Arrow writes other bytes."""
    try:
        return bool(read_shard(run, shard, sha256).equals(table))
    except UsageError:
        return False


def _check_plan(run: RunFolder, claim: Claim, shard: Shard) -> None:
    plan = read_plan(run)
    if not plan.by_value or plan.run_id != claim.run_id:
        raise MessageError(f"{run.uri}: holds another run, which was not submitted by value")
    planned = {(planned.index, planned.first, planned.documents) for planned in plan.shards}
    if not plan.is_open and (shard.index, shard.first, shard.documents) not in planned:
        raise MessageError(f"{run.uri}: its plan is closed and has no shard {shard.index}; name another --out")


def _write_plan(run: RunFolder, claim: Claim, given: Plan | None) -> None:
    if given is None or given.run_id != claim.run_id or given.options != claim.options or not given.by_value:
        raise MessageError(f"run {claim.run_id}: the ledger's plan is not this run's")
    if run.uri.rpartition("/")[2] != f"run={claim.run_id}":
        raise MessageError(f"{run.uri!r}: a run by value lies in a folder run={claim.run_id}")
    opened = replace(given, shards=(), is_open=True, cancelled=False)
    run.write(PLAN_FILE, f"{plan_json(opened, indent=1)}\n".encode(), exclusive=True)


def bring_plan(run: RunFolder, claim: Claim, documents: Documents, patiently: Patiently) -> None:
    """Writes the plan of a stream by value that ended before its first document.

    Raises:
        UnreachableError: it is another run's plan that is missing.
        MessageError: the ledger's entries do not fit.
    """
    plan: Plan | None = patiently(lambda: documents.plan(claim.run_id))
    if plan is None or patiently(lambda: documents.shards(claim.run_id)):
        raise UnreachableError(f"{run.path(PLAN_FILE)}: not there, as seen from this worker")
    _write_plan(run, claim, plan)


def close_plan(claim: Claim, plan: Plan, documents: Documents, leases: Leases) -> Plan:
    """The plan of a run by value whose shards are all recorded; an open one is closed in the run's folder.

    Raises:
        LeaseLostError: the ledger does not know the lease, so its shards may not be the run's: a server that lost its
            memory has none.
        MessageError: the ledger's shards do not fit, or are not all of those in the run's folder.
        StoreError: the plan cannot be written.
    """
    if plan.is_open:
        shards = leases.patiently(lambda: documents.shards(plan.run_id))
        if lost := (claim.folder.committed() | claim.folder.shards()) - {shard.index for shard in shards}:
            raise MessageError(f"{claim.uri}: has shard {min(lost)}, which the broker lost; give the same input again")
        leases.prove(claim)
        plan = plan.closed(shards)
        plan.write(claim.folder)
    return plan
