"""A complete run, opened to be read as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from nermill.producer.runs.run import open_run
from nermill.worker.contracts.errors import StoreError, UsageError
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.plan import Plan


def open_complete(uri: str) -> tuple[RunFolder, Plan]:
    """A run of which every shard has its part.

    Raises:
        UsageError: there is no run, or it is not complete.
    """
    run, plan = open_run(uri)
    if plan.is_open or not {shard.index for shard in plan.shards} <= run.committed():
        raise UsageError(f"{run.uri}: the run is not complete; nermill resume it first")
    return run, plan


@contextmanager
def intact(run: RunFolder, name: str) -> Iterator[None]:
    """Reads a part inside.

    Raises:
        StoreError: it is damaged, or gone.
    """
    try:
        yield
    except FileNotFoundError:
        raise StoreError(f"{run.path(name)}: gone while the run was read; try again") from None
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(f"{run.path(name)}: damaged part ({reason}); remove it and nermill resume") from None
