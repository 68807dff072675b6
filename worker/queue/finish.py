"""A run's last step: ``_SUCCESS`` once every planned shard has its part, then the evaluation where there is gold."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Sequence
from typing import Any

from nermill.worker.contracts.by_value import Documents
from nermill.worker.contracts.command import python_command
from nermill.worker.contracts.layout import PLAN_FILE, SUCCESS_FILE
from nermill.worker.contracts.part import mark_complete, scores_of
from nermill.worker.contracts.plan import read_plan
from nermill.worker.contracts.records import MAX_ATTEMPTS, Claim
from nermill.worker.process.metrics import Metrics
from nermill.worker.queue import by_value
from nermill.worker.queue.leases import Leases

log = logging.getLogger("nermill.worker")

EVALUATION_SECONDS = 3600.0


def finish(claim: Claim, leases: Leases, documents: Documents, metrics: Metrics) -> dict[str, Any]:
    """Marks a run complete and evaluates it.

    Args:
        claim: The lease of the run's last step.
        leases: Whose ledger records the end of the run.
        documents: The ledger's steps for runs by value.
        metrics: Where a run that is not complete is counted as refused.

    Returns:
        ``state``, which is ``complete`` or ``incomplete``, and ``reason``: why there is no report, or what is missing.

    Raises:
        UnreachableError: the run's plan is not to be seen from here.
        LeaseLostError: the ledger does not know the lease any more: the run takes shards again, or the server lost it.
        StoreError: the store does not answer.
        MessageError: the ledger's entries do not fit.
    """
    run = claim.folder
    if not run.exists(PLAN_FILE):
        by_value.bring_plan(run, claim, documents, leases.patiently)
    plan = read_plan(run)
    if plan.by_value:
        plan = by_value.close_plan(claim, plan, documents, leases)
    missing = {shard.index for shard in plan.shards} - run.committed()
    if missing or plan.is_open:
        metrics.refused()
        reason = f"{len(missing)} parts are missing: nermill resume {run.uri}"
        if plan.by_value:
            leases.prove(claim)
            run.remove(SUCCESS_FILE)
            for shard in missing:
                leases.ledger.forget(claim.run_id, shard)
            reason += ", or submit the same input again"
        log.warning("run %s is not complete, %s", claim.run_id, reason)
        leases.ledger.quarantine(claim, reason)
        return {"state": "incomplete", "reason": reason}
    mark_complete(run, sorted(shard.index for shard in plan.shards), lambda: leases.prove(claim))
    run.remove_stale_files()
    log.info("run %s is complete", claim.run_id)
    reason = _evaluate(claim, leases) if plan.has_gold else ""
    scores = scores_of(run) if plan.by_value else None  # for producers that cannot read the folder
    leases.patiently(lambda: leases.ledger.close(claim.run_id, claim, json.dumps(scores) if scores else ""))
    return {"state": "complete", "reason": reason}


def _evaluate(claim: Claim, leases: Leases) -> str:
    """Writes the run's report, unless several processes ended at that.

    Returns:
        Why there is no report; empty where there is one.

    Raises:
        LeaseLostError: the ledger does not know the lease any more.
    """
    leases.prove(claim)
    if claim.attempts > MAX_ATTEMPTS:
        reason = f"no report: {MAX_ATTEMPTS} attempts did not live to write it"
    else:
        reason = evaluate_apart(claim.uri)
    if reason:
        log.warning("run %s: %s", claim.run_id, reason)
    return reason


def evaluate_apart(uri: str) -> str:
    """Evaluates a run in a process of its own, which does not hold this one's interpreter lock and ends with it.

    Returns:
        Why there is no report; empty where there is one.
    """
    command: Sequence[str] = python_command("nermill.worker.evaluation", uri, str(os.getpid()))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=EVALUATION_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no report: the evaluation took more than {EVALUATION_SECONDS:.0f} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return f"no report ({lines[-1] if lines else f'exit code {done.returncode}'})"
    return ""
