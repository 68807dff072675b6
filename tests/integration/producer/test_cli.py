"""The command line as its users meet it: results, one-line errors, exit codes."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq
from rich.console import Console

from nermill.producer.runs import run as runs
from nermill.producer.runs.planning import Request, make_plan
from nermill.producer.runs.progress import _painted
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.status import look
from nermill.worker.contracts.broker import redis_client
from nermill.worker.contracts.layout import REPORT_HTML, REPORT_JSON, SUCCESS_FILE, RunFolder
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.manifest import load_manifest, resolve_artifact
from nermill.worker.contracts.message import KEY_PREFIX
from nermill.worker.contracts.plan import Options
from nermill.worker.contracts.records import WorkerProcess

from .conftest import POISON

COMMANDS = (
    "run", "plan", "submit", "tag", "status", "list", "resume", "rejects", "cancel", "evaluate", "show", "compact",
    "export", "redact", "restore", "publish", "doctor",
)  # fmt: skip


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    texts = ["Ada met Bob", "no one", POISON]
    path.write_text("".join(json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return path


@pytest.fixture
def finished(nermill, broker, serving, corpus, tmp_path) -> str:
    with serving():
        code, out, err = nermill("submit", corpus, "--out", tmp_path / "out", "--broker", broker, "--wait", "--json")
    assert code == 3, err
    return json.loads(out)["run"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(nermill, command):
    code, out, _ = nermill(command, "--help")
    assert code == 0
    assert f"Example: nermill {command} " in " ".join(out.split())
    assert "--json" in out


def test_submit_wait_status_and_rejects_tell_the_same(nermill, broker, finished):
    code, out, _ = nermill("status", finished, "--broker", broker, "--json")
    body = json.loads(out)
    assert (code, body["state"], body["shards"]["committed"]) == (3, "complete", 1)
    assert body["documents"] == {"total": 3, "ok": 2, "rejected": 1}
    names = {"run", "run_id", "seconds", "documents_per_second", "tokens_per_second", "padding_share"}
    assert names <= body.keys()
    code, out, _ = nermill("rejects", finished, "--json")
    assert code == 0
    assert json.loads(out) == {
        "doc_index": 2, "doc_id": "d2", "reason": "model_failure", "message": "poison", "attempts": 1,
    }  # fmt: skip
    assert nermill("rejects", finished)[1] == "d2  model_failure: poison\n"


def test_submit_without_wait_leaves_at_once_and_submits_once(nermill, broker, corpus, tmp_path):
    for _ in range(2):
        code, out, _ = nermill("submit", corpus, "--out", tmp_path / "out", "--broker", broker, "--json")
        body = json.loads(out)
        assert (code, body["state"], body["shards"]["waiting"]) == (0, "running", 1)
    code, out, _ = nermill("cancel", body["run"], "--broker", broker, "--json")
    assert (code, json.loads(out)["state"]) == (0, "cancelled")
    assert nermill("status", body["run"], "--broker", broker)[0] == 3
    assert nermill("resume", body["run"], "--broker", broker)[0] == 0


def test_status_without_a_broker_counts_the_parts(nermill, finished):
    arguments = ("status", finished, "--broker", "redis://localhost:1", "--json")
    code, out, err = nermill(*arguments)
    assert (code, json.loads(out)["state"], err) == (3, "complete", "")
    (Path(finished) / "part-00000.parquet").unlink()
    code, out, err = nermill(*arguments)
    assert (code, json.loads(out)["state"]) == (3, "incomplete")
    assert "counting the parts alone" in err


def test_show_marks_entities(nermill, finished):
    code, out, _ = nermill("show", finished)
    assert (code, out) == (0, "d0  [Ada PER] met [Bob PER]\nd1  no one\nd2  rejected\n")
    rows = [json.loads(line) for line in nermill("show", finished, "--limit", 1, "--json")[1].splitlines()]
    assert [(row["doc_id"], row["text"]) for row in rows] == [("d0", "Ada met Bob")]
    code, _, err = nermill("show", finished, "--format", "conll")
    assert code == 2
    assert "needs CoNLL input" in err


def test_evaluate_scores_and_holds_floors(nermill, broker, serving, tmp_path):
    path = tmp_path / "in.conll"
    path.write_text("Ada B-PER\nis O\n\nHere O\n")
    with serving():
        code, out, err = nermill("submit", path, "--out", tmp_path / "out", "--broker", broker, "--wait", "--json")
    assert code == 0, err
    body = json.loads(out)
    assert body["scores"]["precision"] == pytest.approx(0.5)
    code, out, _ = nermill("evaluate", body["run"], "--json")
    assert (code, json.loads(out)["recall"]) == (0, 1.0)
    for threshold in ("--min-f1", "--min-accuracy"):
        code, _, err = nermill("evaluate", body["run"], threshold, "0.9")
        assert code == 4
        assert "below the threshold" in err
    code, out, _ = nermill("evaluate", body["run"], "--compare", body["run"])
    assert code == 0
    assert "+0.0000" in out
    assert "0 of 2 documents have other tags" in out


def test_a_complete_run_that_has_no_report_gets_it_when_it_is_resumed(nermill, broker, serving, tmp_path):
    path = tmp_path / "in.conll"
    path.write_text("Ada B-PER\nis O\n")
    with serving():
        _, out, _ = nermill("submit", path, "--out", tmp_path / "out", "--broker", broker, "--wait", "--json")
    run = RunFolder(json.loads(out)["run"])
    for name in (REPORT_JSON, REPORT_HTML, SUCCESS_FILE):
        run.remove(name)
    code, out, err = nermill("resume", run.uri, "--broker", broker, "--json")
    assert code == 0, err
    assert (json.loads(out)["state"], json.loads(out)["scores"]["recall"]) == ("complete", 1.0)
    assert all(run.exists(name) for name in (REPORT_JSON, REPORT_HTML, SUCCESS_FILE))


def test_compact_says_what_it_did(nermill, finished, two_runs):
    code, out, _ = nermill("compact", finished, "--json")
    assert (code, json.loads(out)["parts"]) == (0, {"before": 1, "after": 1})
    assert nermill("compact", finished)[1] == (
        f"{finished}: 1 part, none of them small enough to be joined to another\n"
    )
    code, out, _ = nermill("compact", *two_runs)
    assert (code, [line.partition(": ")[2] for line in out.splitlines()]) == (0, ["2 parts became 1"] * 2)


@pytest.fixture
def two_runs(nermill, broker, serving, tmp_path) -> list[str]:
    """Two finished runs of two shards each: of documents that are words, with gold."""
    found = []
    for name in ("Ada", "Bob"):
        path = tmp_path / f"{name}.conll"
        path.write_text(f"{name} B-PER\nis O\n\nHere O\n")
        arguments = ["submit", path, "--out", tmp_path / "two", "--broker", broker, "--shard-documents", 1]
        with serving():
            found.append(json.loads(nermill(*arguments, "--wait", "--json")[1])["run"])
    return found


@pytest.mark.parametrize("command", ["show", "status", "rejects", "evaluate", "compact"])
def test_a_damaged_part_is_one_line(nermill, finished, command):
    part = Path(finished) / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-40])
    code, out, err = nermill(command, finished)
    assert (code, out, err.count("\n")) == (2 if command == "evaluate" else 1, "", 1), err
    assert f"{part}: " in err
    assert "damaged" in err


def test_list_tells_the_runs_below_a_folder(nermill, broker, finished, two_runs, corpus, tmp_path):
    nermill("evaluate", *two_runs)
    waiting = json.loads(
        nermill("submit", corpus, "--out", tmp_path / "deep/er", "--model", "demo", "--broker", broker, "--json")[1]
    )["run"]
    old = tmp_path / "run=0ld"
    old.mkdir()
    (old / "plan.json").write_text("{}")
    code, out, err = nermill("list", tmp_path, "--broker", broker, "--json")
    found = {entry["run"]: entry for entry in map(json.loads, out.splitlines())}
    assert (code, set(found)) == (0, {finished, *two_runs, waiting, str(old)})
    assert [found[run]["state"] for run in (finished, waiting, str(old))] == ["complete", "running", "unreadable"]
    assert (found[finished]["documents"], found[finished]["f1"]) == ({"total": 3, "finished": 3}, None)
    assert (found[waiting]["documents"], found[waiting]["model"]) == ({"total": 3, "finished": 0}, "demo")
    assert (found[two_runs[0]]["f1"], found[two_runs[0]]["model"]) == (pytest.approx(2 / 3), "stand-in")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found[finished]["created"])
    assert (err.count("\n"), "plan version 1" in err) == (1, True)
    code, out, _ = nermill("list", tmp_path / "two", "--broker", "redis://localhost:1")
    heading, *lines = out.splitlines()
    assert heading.split() == ["state", "documents", "created", "model", "F1", "run"]
    assert [line.split()[:2] + line.split()[3:5] for line in lines] == [["complete", "2", "stand-in", "0.6667"]] * 2
    code, out, err = nermill("list", tmp_path / "deep", "--broker", "redis://localhost:1")
    assert "incomplete  0 of 3" in out
    assert "counting the parts alone" in err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert nermill("list", empty) == (0, "", f"nermill: {empty}: no runs below it\n")
    assert nermill("list", tmp_path / "dep") == (
        2, "", f"nermill: {tmp_path}/dep: no such folder; did you mean {tmp_path}/deep?\n",
    )  # fmt: skip
    assert json.loads(nermill("list", finished, "--json")[1])["run"] == finished, "a run itself"


def test_list_reads_a_store(nermill, tmp_path):
    out = f"memory://{tmp_path.name}"
    (tmp_path / "in.jsonl").write_text('{"text": "Ada"}\n')
    run, _ = make_plan(Request((str(tmp_path / "in.jsonl"),), out))
    code, out, _ = nermill("list", out, "--broker", "redis://localhost:1", "--json")
    assert (code, json.loads(out)["run"], json.loads(out)["state"]) == (0, run.uri, "incomplete")


def test_commands_take_several_runs(nermill, broker, finished, two_runs):
    both = [*two_runs, "--broker", broker]
    code, out, _ = nermill("status", *two_runs, finished, "--broker", broker, "--json")
    assert code == 3, "one of them has rejects"
    assert [json.loads(line)["run"] for line in out.splitlines()] == [*two_runs, finished]
    assert nermill("status", *both)[1].count("(complete)") == 2
    code, out, _ = nermill("show", *two_runs)
    first, second = (f"{run}:\n" for run in two_runs)
    assert (code, out.startswith(first), second in out) == (0, True, True)
    assert out.count("Here PER]") == 2
    code, out, _ = nermill("show", *two_runs, "--json", "--limit", 1)
    assert [(json.loads(line)["run"], json.loads(line)["words"][0]) for line in out.splitlines()] == [
        (two_runs[0], "Ada"), (two_runs[1], "Bob"),
    ]  # fmt: skip
    code, out, _ = nermill("show", *two_runs, "--format", "conll")
    assert out.split("\n")[0] == "Ada B-PER"
    assert "Bob B-PER" in out
    code, out, _ = nermill("rejects", finished, two_runs[0], "--json")
    assert [json.loads(line)["run"] for line in out.splitlines()] == [finished]
    code, out, _ = nermill("evaluate", *two_runs, "--json", "--min-f1", "0.99")
    assert (code, len(out.splitlines())) == (4, 2)
    for command in ("resume", "cancel"):
        code, out, _ = nermill(command, *both, "--json")
        assert (code, [json.loads(line)["state"] for line in out.splitlines()]) == (0, ["complete"] * 2)


def test_nothing_is_done_to_any_run_where_one_is_wrong(nermill, broker, two_runs, tmp_path):
    for command in ("status", "show", "rejects", "evaluate", "compact", "resume", "cancel"):
        options = [] if command in ("show", "evaluate", "compact") else ["--broker", broker]
        code, out, err = nermill(command, two_runs[0], tmp_path / "nowhere", *options)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert "no run here" in err
    assert len(list(Path(two_runs[0]).glob("part-*.parquet"))) == 2


@pytest.mark.parametrize("options", [[], ["--json"], ["--format", "conll"]])
@pytest.mark.parametrize("lines", [0, 1])
def test_a_reader_that_has_seen_enough_is_no_failure(two_runs, options, lines):
    """With 0 the pipe breaks when what is buffered is written at the end, with 1 in the middle of the command."""
    command = [sys.executable, "-c", SHOW_MANY, str(lines * 5_000 or 1), "show", two_runs[0], *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(lines):
            assert process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == ("", 0)


SHOW_MANY = """
import sys
from nermill.producer import cli
from nermill.producer.entities import show
rows, times = show.read_rows, int(sys.argv.pop(1))
show.read_rows = lambda *arguments: (row for _ in range(times) for row in rows(*arguments))
cli.main()
"""


def test_an_overlap_that_no_window_has_is_refused(nermill, broker, corpus, tmp_path):
    small = tmp_path / "art"
    shutil.copytree(resolve_artifact("demo"), small)
    manifest = json.loads((small / "manifest.json").read_text())
    (small / "manifest.json").write_text(json.dumps({**manifest, "max_length": 48}))
    told = "nermill: --overlap 4096: windows of minilm-ner-en have 512 tokens; name fewer\n"
    for command, options in (("run", ["--devices", "cpu"]), ("submit", ["--broker", broker]), ("plan", [])):
        arguments = [command, corpus, "--out", tmp_path / "out", "--model", "demo", *options]
        assert nermill(*arguments, "--overlap", 4096) == (2, "", told)
        assert nermill(command, corpus, "--out", tmp_path / "out", "--model", small, *options, "--overlap", 48)[0] == 2
    stream = [sys.executable, "-m", "nermill.producer.cli", "submit", "-", "--out", str(tmp_path / "out")]
    asked = [*stream, "--broker", broker, "--model", "demo", "--overlap", "4096"]
    done = subprocess.run(asked, input="", capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, told)
    assert not (tmp_path / "out").exists()
    assert nermill("plan", corpus, "--model", small)[0] == 0, "the default fits every model"


def test_plan_tells_without_writing(nermill, tmp_path):
    path = tmp_path / "in.jsonl"
    ids = ["a", "b", "a", "c", "b", "a"]
    path.write_text(
        "".join(json.dumps({"id": i, "text": "Ada " * 40}) + "\n" for i in ids) + '{"id": "e", "text": ""}\n'
    )
    costs = tmp_path / "costs.json"
    costs.write_text(
        json.dumps({"kind": "measured", "source": "here", "shapes": [{"rows": 1, "length": 512, "seconds": 51.2}]})
    )
    arguments = ("plan", path, "--out", tmp_path / "out", "--shard-documents", 4, "--costs", costs)
    code, out, _ = nermill(*arguments, "--json")
    body = json.loads(out)
    assert code == 0
    assert body["documents"] == {"total": 7, "rejected": 1}
    assert body["duplicate_ids"] == {"documents": 3, "examples": ["a", "b"]}
    assert body["shards"] == 2
    assert sum(entry["documents"] for entry in body["histogram"]) == 6
    assert body["device_seconds"] == pytest.approx(body["tokens"]["total"] / 10, abs=0.1)
    ways = {"padded": 6 * 51.2, "bucketed": 6 * 51.2, "packed": body["device_seconds"]}
    assert body["device_seconds_by_way"] == pytest.approx(ways, abs=0.1)
    assert not (tmp_path / "out").exists()
    _, out, _ = nermill(*arguments)
    assert "3 documents with an id that came before: a, b" in out
    assert "█" in out
    assert re.search(r"ways +padded to the longest 5 min 7 s, one a row of the nearest length 5 min 7 s, packed ", out)
    plain = json.loads(costs.read_text()) | {"layout": "plain", "is_free": False}
    costs.write_text(json.dumps(plain))
    assert json.loads(nermill(*arguments, "--json")[1])["device_seconds"] == pytest.approx(6 * 51.2, abs=0.1)
    _, out, _ = nermill("plan", path, "--costs", "310p3-bert-large")
    assert "of one device (estimate: published sequences/s of Ascend/ModelZoo-PyTorch" in out


def test_plan_tells_the_price_of_the_run_and_of_a_million_documents(nermill, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": n, "text": "Ada " * 40}) + "\n" for n in range(4)) + '{"text": ""}\n')
    costs = tmp_path / "costs.json"
    costs.write_text(
        json.dumps({"kind": "measured", "source": "here", "shapes": [{"rows": 1, "length": 512, "seconds": 512_000}]})
    )
    code, out, _ = nermill("plan", path, "--costs", costs, "--price-per-hour", "2.5", "--json")
    body = json.loads(out)
    assert code == 0
    run = body["tokens"]["total"] * 1000 / 3600 * 2.5
    assert body["price"] == pytest.approx({"per_hour": 2.5, "run": run, "per_million_documents": run / 4 * 1e6})
    told = f"price      {run:,.2f}, {run / 4 * 1e6:,.2f} for a million documents like these (at 2.5 an hour)"
    assert told in " ".join(nermill("plan", path, "--costs", costs, "--price-per-hour", "2.5")[1].split("\n"))
    assert json.loads(nermill("plan", path, "--costs", costs, "--json")[1])["price"] is None
    shutil.copytree(resolve_artifact("demo"), tmp_path / "art")
    (tmp_path / "art" / "bench.json").unlink()
    code, _, error = nermill("plan", path, "--model", tmp_path / "art", "--price-per-hour", "1")
    assert (code, error.count("\n")) == (2, 1)
    assert "--price-per-hour: the device's time is not known" in error


def test_plan_expects_seconds_from_the_table_that_lies_with_the_artifact(nermill, tmp_path, sample):
    """After the demo model is built again: nermill-build bench demo --json > model_build/demo/artifact/bench.json."""
    corpus = sample / "wikigold.jsonl"
    code, out, _ = nermill("plan", corpus, "--json")
    body = json.loads(out)
    assert code == 0
    assert 1_000 < body["tokens"]["total"] / body["device_seconds"] < 100_000
    assert re.match("measured: nermill-build bench on .+", body["device_seconds_from"])
    shutil.copytree(resolve_artifact("demo"), tmp_path / "art")
    table = tmp_path / "art" / "bench.json"
    table.write_text(table.read_text().replace(load_manifest(tmp_path / "art").sha256, "0" * 64))
    code, out, _ = nermill("plan", corpus, "--model", tmp_path / "art")
    assert code == 0
    assert "unknown: nermill-build bench MODEL --json" in out


def test_an_id_that_is_no_string_costs_that_document(nermill, broker, serving, tmp_path):
    corpus = tmp_path / "in.jsonl"
    corpus.write_text('{"id": 7, "text": "Ada"}\n{"id": {"a": 1}, "text": "Bob"}\n{"id": null, "text": "Carol"}\n')
    with serving():
        code, out, _ = nermill("submit", corpus, "--out", tmp_path / "out", "--broker", broker, "--wait", "--json")
    run = json.loads(out)["run"]
    assert code == 3
    assert nermill("rejects", run)[1] == f"{corpus}:2  wrong_type: the id is a dict, not a string or number\n"
    shown = nermill("show", run, "--json")[1].splitlines()
    assert [json.loads(line)["doc_id"] for line in shown] == ["7", f"{corpus}:2", f"{corpus}:3"]


def test_status_says_why_nobody_is_at_work(nermill, broker, corpus, tmp_path):
    run = json.loads(nermill("submit", corpus, "--out", tmp_path / "out", "--broker", broker, "--json")[1])["run"]
    assert "trouble    no worker listens at the broker" in nermill("status", run, "--broker", broker)[1]
    strange = {"junk": 1e15, "[]": 1e15, '{"name": "w0"}': 1e15}
    redis_client(broker).zadd(f"{KEY_PREFIX}workers", strange)
    ledger = Ledger(redis_client(broker))
    ledger.register(WorkerProcess("w1", "npu:3", "other", "b" * 64), 60)
    out = nermill("status", run, "--broker", broker)[1]
    assert "trouble" not in out
    assert "worker     w1 on npu:3: 0 documents" in out
    runs.send(*runs.open_run(run), Queue(broker))
    ledger.open(runs.open_run(run)[1].run_id, run, Options(), artifact="a" * 64)
    out = nermill("status", run, "--broker", broker)[1]
    assert "trouble    no worker serves the artifact that the run asks for" in out
    assert "worker     w1" not in out


def test_hostile_text_does_not_steer_the_terminal(nermill, broker, corpus, tmp_path):
    steering = "\x1b]0;owned\x07\x9b2J"
    twice = tmp_path / "twice.jsonl"
    twice.write_text(2 * (json.dumps({"id": steering, "text": "Ada"}) + "\n"))
    shown = nermill("plan", twice)[1]
    assert "1 document with an id that came before: \ufffd]0;owned\ufffd\ufffd2J" in shown
    run = json.loads(nermill("submit", corpus, "--out", tmp_path / "out", "--broker", broker, "--json")[1])["run"]
    ledger = Ledger(redis_client(broker))
    ledger.open(runs.open_run(run)[1].run_id, run, Options(), artifact="a" * 64)
    ledger.register(WorkerProcess("w1", "npu:3", steering, "b" * 64), 60)
    shown += nermill("status", run, "--broker", broker)[1] + nermill("doctor", "--broker", broker)[1]
    shown += nermill("plan", tmp_path / f"{steering}.jsonl")[2]
    assert shown.count("]0;owned") == 4
    painted = io.StringIO()
    console = Console(file=painted, force_terminal=True, color_system=None, width=1_000)
    console.print(_painted(look(*runs.open_run(run), Queue(broker)), own_worker=False))
    assert "no worker serves the artifact" in painted.getvalue()
    assert not set(shown + painted.getvalue()) & set(steering) - set("]0;owned2J")


@pytest.mark.parametrize(("words", "expected"), [("nermill st", "status"), ("nermill status --wa", "--watch")])
def test_the_shell_completes_commands_and_options(words, expected):
    environment = {**os.environ, "_NERMILL_COMPLETE": "complete_bash", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(words.count(" "))
    told = subprocess.check_output([sys.executable, "-m", "nermill.producer.cli"], env=environment, text=True)
    assert told.split() == [expected]


def test_doctor_names_what_fails_and_how_to_fix_it(nermill, broker, serving, corpus, tmp_path):
    code, out, _ = nermill("doctor", "--broker", "redis://localhost:1", "--model", tmp_path / "nothing", "--json")
    findings = {f["name"]: f for f in json.loads(out)["findings"]}
    assert code == 1
    assert [name for name, f in findings.items() if not f["ok"]] == ["broker", "model"]
    assert "valkey-server" in findings["broker"]["fix"]
    code, out, _ = nermill(
        "doctor", "--broker", broker, "--devices", "cuda:77,gpu", "--out", corpus / "below", "--model", tmp_path
    )
    assert code == 1
    assert re.search(r"workers +FAILS no worker listens.*\n +fix: +nermill-worker", out)
    assert re.search(r"device +FAILS cuda:77 is not visible", out)
    assert re.search(r"device +FAILS 'gpu' is no device", out)
    assert re.search(r"output +FAILS .*cannot be a folder", out)


def test_doctor_knows_a_wrong_password_and_never_shows_it(nermill, broker):
    client = redis_client(broker)
    client.config_set("requirepass", "right")
    try:
        url = broker.replace("redis+socket://", "redis+socket://:wrong@")
        code, out, err = nermill("doctor", "--broker", url, "--json")
    finally:
        client.config_set("requirepass", "")
    finding = json.loads(out)["findings"][0]
    assert (code, finding["ok"]) == (1, False)
    assert "right password" in finding["fix"]
    assert "wrong@" not in out + err


def test_wrong_usage_is_one_line_and_exit_code_2(nermill, broker, corpus, tmp_path):
    out, good = tmp_path / "out", ["--broker", broker]
    mixed, parquet, half, planned = (tmp_path / name for name in ("mixed", "t.parquet", "half.jsonl.gz", "planned"))
    mixed.mkdir()
    (mixed / "bad.conll").write_text("Ada B-PER\nmet VBD O\n")
    shutil.copy(corpus, mixed)
    pq.write_table(pa.table({"body": ["Ada"]}), parquet)
    half.write_bytes(gzip.compress(os.urandom(1000))[:500])
    planned.mkdir()
    (planned / "_plan.json").write_text("{}")
    runs = tmp_path / "runs"
    (runs / "run=one").mkdir(parents=True)
    cases = {
        r"No such command 'rnu'\. Did you mean 'run'": ["rnu"],
        r"No such option: --jsn": ["run", corpus, "--jsn"],
        r"Missing option '--out'": ["run", corpus],
        r"did you mean .*in.jsonl": ["run", tmp_path / "im.jsonl", "--out", out],
        r"--format 'docx': one of jsonl, json, csv, tsv": ["plan", corpus, "--format", "docx"],
        r"--unit 'word': one of sentence, document": ["plan", corpus, "--unit", "word"],
        r"--aggregation 'best': one of none": ["plan", corpus, "--aggregation", "best"],
        r"--max-chars": ["plan", corpus, "--max-chars", "0"],
        r"--shard-documents": ["plan", corpus, "--shard-documents", "none"],
        r"--overlap": ["plan", corpus, "--overlap", "-1"],
        r"--linger": ["submit", "-", "--out", out, "--linger", "soon"],
        r"--limit": ["show", "x", "--limit", "0"],
        r"--min-f1": ["evaluate", "x", "--min-f1", "2"],
        r"nowhere: no model artifact": ["plan", corpus, "--model", "nowhere"],
        r"nobody://out: Protocol not known": ["submit", corpus, "--out", "nobody://out", *good],
        r"cannot be a folder": ["submit", corpus, "--out", corpus / "x", *good],
        r"mixed formats": ["submit", mixed, "--out", out, *good],
        r"no field 'text' \(found: body\); name the text with --text-column": ["submit", parquet, "--out", out, *good],
        r"compressed data damaged or cut short": ["submit", half, "--out", out, *good],
        r"bad.conll:2: 3 columns": ["submit", mixed / "bad.conll", "--out", out, *good],
        r"a run's folder itself": ["submit", corpus, "--out", planned, *good],
        r"nobody://in: Protocol not known": ["submit", "nobody://in", "--out", out, *good],
        r"--devices 'gpu': 'gpu' is no device; say auto": ["run", corpus, "--out", out, "--devices", "gpu"],
        r"a folder of runs, not a run; name one: .*/run=one": ["status", runs, *good],
        r"no run here": ["status", tmp_path, *good],
        r"--follow tails one file": ["submit", corpus, corpus, "--follow", "--out", out, *good],
        r"redis\+cluster": ["submit", corpus, "--out", out, "--broker", "redis+cluster://x"],
        r"broker URLs begin with": ["submit", corpus, "--out", out, "--broker", "amqp://me:secret@x"],
    }  # fmt: skip
    for pattern, arguments in cases.items():
        code, stdout, err = nermill(*arguments)
        assert (code, stdout) == (2, ""), (arguments, err)
        assert re.search(pattern, err), (pattern, err)
        assert err.startswith("nermill: ")
        assert err.count("\n") == 1
        assert "secret" not in err
    assert not out.exists()


def test_a_broker_that_is_not_there_fails_with_1_and_writes_nothing(nermill, corpus, tmp_path):
    code, _, err = nermill("submit", corpus, "--out", tmp_path / "out", "--broker", "redis://localhost:1")
    assert code == 1
    assert err.startswith("nermill: redis://localhost:1: the broker does not answer")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_settings_from_the_environment_give_way_to_flags(nermill, monkeypatch, broker, corpus, tmp_path):
    monkeypatch.setenv("NERMILL_BROKER_URL", broker)
    monkeypatch.setenv("NERMILL_OUT", str(tmp_path / "env"))
    monkeypatch.setenv("NERMILL_JSON", "1")
    assert json.loads(nermill("submit", corpus)[1])["run"].startswith(str(tmp_path / "env"))
    assert json.loads(nermill("submit", corpus, "--out", tmp_path / "flag")[1])["run"].startswith(
        str(tmp_path / "flag")
    )


def test_ctrl_c_while_waiting_says_how_to_resume(broker, corpus, tmp_path):
    command = [
        sys.executable,
        "-m",
        "nermill.producer.cli",
        "submit",
        str(corpus),
        "--out",
        str(tmp_path / "out"),
        "--wait",
    ]
    process = subprocess.Popen([*command, "--broker", broker], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "waiting for a worker" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 3
    assert re.search(r"stopped; .* nermill resume .*/out/run=\w+\n", err)


def test_version(nermill):
    pytest.importorskip("importlib.metadata").version("nermill")
    assert re.fullmatch(r"nermill \d+\.\d+\.\d+\n", nermill("--version")[1])


def test_help_is_quick():
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    fastest = min(_seconds(environment) for _ in range(3))
    assert fastest < 1.0  # 0.15 s on a machine of its own


def _seconds(environment: dict[str, str]) -> float:
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "nermill.producer.cli", "--help"], env=environment, check=True, capture_output=True
    )
    return time.monotonic() - began


def test_labels_that_gold_and_model_do_not_share_are_explained(nermill, broker, serving, tmp_path):
    corpus, gold = tmp_path / "in.conll", ("B-person", "O")
    corpus.write_text("".join(f"{word}\t{tag}\n" for word, tag in zip(("Ada", "met"), gold, strict=True)))
    command = ["submit", corpus, "--out", tmp_path / "out", "--wait", "--json", "--broker", broker]
    with serving():
        code, out, err = nermill(*command)
    status = json.loads(out)
    assert (code, status["scores"]["f1"]) == (0, 0.0)
    mend = f"nermill evaluate {status['run']} --map person=PER"
    assert f"no label is in both, so F1 is 0; to compare them: {mend}\n" in err
    code, out, _ = nermill(*mend.split()[1:], "--json")
    report = json.loads(out)
    assert (code, report["f1"], report["labels"]["gold"]["mapped"]) == (0, 1.0, {"person": 1})


def test_documents_that_are_known_to_be_rejected_show_in_the_exit_code_before_they_are_tagged(
    nermill, broker, tmp_path
):
    path = tmp_path / "two.jsonl"
    path.write_text('{"text": "Ada"}\n{"text": ""}\n')
    for _ in range(2):  # planned, then found again
        code, out, err = nermill("submit", path, "--out", tmp_path / "out", "--broker", broker, "--json")
        assert (code, json.loads(out)["documents"]["rejected"]) == (3, 0)
        assert f"1 document rejected as unreadable: nermill rejects {json.loads(out)['run']}" in err


def test_what_is_left_out_and_rejected_is_said(nermill, broker, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "README.md").write_text("# Data")
    (folder / "a.csv").write_text("id,text\n1,Ada\n2\n")
    code, out, err = nermill("plan", folder, "--json")
    assert (code, json.loads(out)["documents"]) == (0, {"total": 2, "rejected": 1})
    assert err == f"nermill: left out: {folder}/README.md (documentation)\n"
    code, out, err = nermill("plan", folder, "--on-error", "fail")
    assert (code, out) == (2, "")
    assert (
        f"{folder}/a.csv:3: 1 field where the header has 2; correct it, or leave it out with --on-error reject" in err
    )


def test_labels_that_the_model_lacks_are_named_before_anything_is_written(nermill, tmp_path):
    corpus = tmp_path / "in.jsonl"
    corpus.write_text('{"text": "Ada"}')
    code, out, err = nermill("plan", corpus, "--out", tmp_path / "out", "--only", "GPE")
    assert (code, out) == (2, "")
    assert err == "nermill: --only GPE: the model demo has no label GPE; it has LOC, MISC, ORG, PER\n"
    assert not (tmp_path / "out").exists()
