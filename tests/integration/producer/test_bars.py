"""Work that takes long shows a bar, on a terminal alone."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SAMPLE

NERMILL = [sys.executable, "-m", "nermill.producer.cli"]
LINES = SAMPLE / "wikigold.jsonl"
BAR = "━"


def on_a_terminal(words: list[str], given: Path) -> tuple[int, str]:
    """Runs a command whose standard error is a terminal; answers its exit code and what the terminal got."""
    terminal, end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    environment.pop("NO_COLOR", None)
    with given.open() as lines:
        process = subprocess.Popen(words, stdin=lines, stdout=subprocess.DEVNULL, stderr=end, env=environment)
    os.close(end)
    got = b""
    try:
        while block := os.read(terminal, 1 << 16):
            got += block
    except OSError:  # nobody has the other end any more
        pass
    os.close(terminal)
    return process.wait(60), got.decode()


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_there_is_a_bar_on_a_terminal_and_nothing_elsewhere(broker, serving, nermill, tmp_path):
    gold = tmp_path / "gold.conll"
    gold.write_text("".join(f"Ada B-PER\nmet O\nBob{n} B-PER\n\n" for n in range(40)))
    out = ["--out", str(tmp_path / "out"), "--broker", broker, "--shard-documents", "8", "--wait"]
    with serving():
        subprocess.run([*NERMILL, "submit", str(gold), *out], capture_output=True, check=True)
        [run] = map(str, (tmp_path / "out").glob("run=*"))
        with LINES.open() as lines:
            subprocess.run([*NERMILL, "submit", "-", *out], stdin=lines, capture_output=True, check=True)
        [stream] = {str(path) for path in (tmp_path / "out").glob("run=*")} - {run}
        for arguments, name, counted in [
            (["plan", str(gold)], "reading", "documents"),
            (["evaluate", run], "evaluating", "documents"),
            (["compact", run], "compacting", "shards read"),
            (["submit", "-", "--resume", stream, *out[2:]], "passing over", "bytes"),
        ]:
            code, told = on_a_terminal([*NERMILL, *arguments], LINES)
            assert code == 0, told
            assert [text in told for text in (name, BAR, counted)] == [True] * 3, told
            if "-" not in arguments:
                code, _, err = nermill(*arguments)
                assert (code, [text in err for text in (name, BAR)]) == (0, [False] * 2), err


@pytest.mark.parametrize("told", [[], [(0, 0)], [(1, 2), (2, 2)]])
def test_a_bar_bears_any_count(capfd, told):
    from nermill.producer.runs.progress import counting

    with counting("counting", "things") as on_count:
        for done, total in told:
            on_count(done, total)
    assert capfd.readouterr() == ("", "")
