"""What a process that is gone left of a stream."""

from __future__ import annotations

from pathlib import Path

import pytest

from nermill.producer.runs.recovery import durable_shards
from nermill.producer.runs.shards import write_shard
from nermill.producer.sources.live import Position
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.layout import RunFolder


def test_the_last_shard_is_synced_before_a_stream_goes_on_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer may have ended, or failed, between the file's name and its sync."""
    run = RunFolder(str(tmp_path))
    written = [
        write_shard(run, index, index, [Document(str(index), "Ada")], position=Position(index + 1, index + 1, ""))
        for index in range(2)
    ]
    synced: list[str] = []
    monkeypatch.setattr(RunFolder, "sync", lambda _, name: synced.append(name))
    shards, position = durable_shards(run)
    assert (shards, position) == (written, Position(2, 2, ""))
    assert synced == [run.shard_file(1)]
    assert durable_shards(RunFolder(f"{tmp_path}/none")) == ([], None)
