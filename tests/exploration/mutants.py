"""Faults seeded into the product's code, each of which the exploration must find.

Each mutant is a text patch, applied to a copy of the product that lives as long as its search.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """A patch.

    Attributes:
        name: What the product does not do any more, or does wrong.
        file: The file, below the repository.
        old: Text that occurs in it once.
        new: What stands in its place.
        scenarios: Where to look first.
    """

    name: str
    file: str
    old: str
    new: str
    scenarios: tuple[str, ...] = ("disk",)


STORE, LAYOUT = "worker/contracts/store.py", "worker/contracts/layout.py"
LEDGER, LUA, DISPATCH = "worker/contracts/ledger.py", "worker/contracts/ledger.lua", "worker/contracts/dispatch.py"
SHARDS, LEASES, FINISH, POISON, PARTS, PART = (
    "worker/queue/shards.py",
    "worker/queue/leases.py",
    "worker/queue/finish.py",
    "worker/queue/poison.py",
    "worker/tagging/parts.py",
    "worker/contracts/part.py",
)
RUN, REPORT = "producer/runs/run.py", "worker/evaluation/report.py"
BY_VALUE, RECOVERY = "worker/queue/by_value.py", "producer/runs/recovery.py"
BY_REFERENCE = "producer/runs/stream.py"
STREAM, STREAM_BY_VALUE = "producer/runs/base_stream.py", "producer/runs/stream_by_value.py"

MUTANTS = (
    Mutant(
        "a part replaces one that is there", STORE, "os.link(temporary, path)", "os.replace(temporary, path)", ("slow",)
    ),
    Mutant("a file is not synced", STORE, "            os.fsync(stream.fileno())\n", ""),
    Mutant(
        "a file's name is not synced",
        STORE,
        "            os.unlink(temporary)\n    _sync_folder(folder)\n",
        "            os.unlink(temporary)\n",
    ),
    Mutant("a new folder is not synced", STORE, "        _sync_folder(os.path.dirname(folder))\n", "        pass\n"),
    Mutant("a store's put is not conditional", STORE, ', mode="create")', ")", ("store",)),
    Mutant("a part that is found is not synced", SHARDS, "            run.sync(name)\n", ""),
    Mutant("a mark that is found is not synced", PART, "        run.sync(SUCCESS_FILE)\n", "", ("slow",)),
    Mutant("a plan that is found is not synced", RUN, "    run.sync(PLAN_FILE)\n", ""),
    Mutant(
        "a shard is recorded before its part is there",
        SHARDS,
        "        committed, is_ours = self._commit(",
        "        self._ledger.complete(claim, self._settings.worker_name, ok=2, rejected=0, tokens=2, computed=1)\n"
        "        committed, is_ours = self._commit(",
    ),
    Mutant(
        "leases are not renewed",
        LEASES,
        "self.ledger.renew(claim, self.seconds, tokens=tokens)\n                recovered",
        "pass\n                recovered",
        ("slow",),
    ),
    Mutant(
        "workers do not recover what is lost",
        LEASES,
        "recovered = self._dispatcher.recover(pause)",
        "recovered = 0",
        ("alone",),
    ),
    Mutant(
        "a worker that lost its lease commits its part",
        SHARDS,
        "if time.monotonic() > claim.fresh_until:",
        "if False:",
        ("compact",),
    ),
    Mutant(
        "a late part stays in a compacted run",
        SHARDS,
        "                    run.remove(name)\n                    raise\n",
        "                    raise\n",
        ("compact",),
    ),
    Mutant(
        "leases repeat their number",
        LEDGER,
        "lease, number = uuid.uuid4().hex,",
        'lease, number = "1",',
        ("slow", "disk"),
    ),
    Mutant(
        "a late thread takes its successor's claim",
        LEASES,
        "if self._held.get(key) is claim:",
        "if True:",
        ("threads",),
    ),
    Mutant(
        "a shard is leased that another worker holds",
        LUA,
        "if held and tonumber(held) > now then return {'leased elsewhere'} end",
        "",
    ),
    Mutant(
        "a shard is leased that is recorded",
        LUA,
        "  if redis.call('HEXISTS', key(run, 'results'), shard) == 1 then return {'done'} end\n",
        "",
    ),
    Mutant(
        "the last step is leased when it is done",
        LUA,
        "if shard == FINISH and state(run) ~= 'finishing' then",
        "if false then",
    ),
    Mutant("attempts are not counted", LUA, "redis.call('HINCRBY', key(run, 'attempts'), shard, 1)", "1", ("poison",)),
    Mutant("strikes are not counted", LUA, "redis.call('HINCRBY', key(run, 'strikes'), trial, 1)", "", ("poison",)),
    Mutant(
        "anybody renews a lease",
        LUA,
        "function step.renew(run, shard, lease, milliseconds, tokens, now)\n"
        "  if not holds(run, shard, lease) then return 0 end",
        "function step.renew(run, shard, lease, milliseconds, tokens, now)",
    ),
    Mutant(
        "anybody releases a lease",
        LUA,
        "function step.release(run, shard, lease, last_error)\n  if not holds(run, shard, lease) then return 0 end",
        "function step.release(run, shard, lease, last_error)",
        ("slow", "disk"),
    ),
    Mutant("a release counts the attempt", LUA, "  redis.call('HINCRBY', key(run, 'attempts'), shard, -1)\n", ""),
    Mutant("a released shard does not wait", LUA, "shard, -1)\n  wait(run, shard)\n", "shard, -1)\n"),
    Mutant(
        "an expired shard does not wait",
        LUA,
        "    wait(run, shard)\n  end\n  held_bytes",
        "  end\n  held_bytes",
    ),
    Mutant("a lease stays in the index", LUA, "  redis.call('ZREM', prefix .. 'leases', join(run, shard))\n", ""),
    Mutant(
        "a message that was received stays in the index",
        LUA,
        "    redis.call('ZREM', prefix .. 'sent', join(run, shard))\n    redis.call('HDEL'",
        "    redis.call('HDEL'",
    ),
    Mutant(
        "a shard counts as often as it is recorded",
        LUA,
        "local newly = redis.call('HSETNX', key(run, 'results')",
        "local newly = 1; redis.call('HSET', key(run, 'results')",
    ),
    Mutant(
        "a recorded shard's message is waited for",
        LUA,
        "if holds(run, shard, lease) then unlease(run, shard) end\n  unsend(run, shard)\n",
        "if holds(run, shard, lease) then unlease(run, shard) end\n",
        ("queue",),
    ),
    Mutant(
        "a sent shard is not noted",
        LUA,
        "        redis.call('HSET', key(run, 'sent'), shard, sent(queue, priority))\n",
        "",
    ),
    Mutant(
        "a shard is added that is sent or leased",
        LUA,
        "if redis.call('HEXISTS', key(run, 'leases'), shard) == 0 "
        "and redis.call('HEXISTS', key(run, 'sent'), shard) == 0 then",
        "if true then",
    ),
    Mutant(
        "lost messages are not sent again",
        LUA,
        "local again = depth == '0' and #waiting or math.min(before, missing, #waiting)",
        "local again = 0",
    ),
    Mutant(
        "all that waits is sent again",
        LUA,
        "local again = depth == '0' and #waiting or math.min(before, missing, #waiting)",
        "local again = #waiting",
        ("queue",),
    ),
    Mutant(
        "the last step comes early",
        LUA,
        "< redis.call('HLEN', key(run, 'shards')) then",
        "+ 1 < redis.call('HLEN', key(run, 'shards')) then",
    ),
    Mutant("the last step does not come", LUA, "  return wait(run, FINISH)\nend", "  return 0\nend"),
    Mutant(
        "a finished run keeps its lease",
        LUA,
        "  unlease(run, FINISH)\n  unsend(run, FINISH)\n",
        "  unsend(run, FINISH)\n",
    ),
    Mutant(
        "a finished run stays for a week",
        LUA,
        "scores) end\n  expire(run, seconds)\n",
        "scores) end\n",
    ),
    Mutant("everybody recovers at once", LEDGER, "1, nx=True, px", "1, nx=False, px"),
    Mutant(
        "expired shards are not sent",
        DISPATCH,
        "        self._send(lost)\n        self.promote(queues)\n",
        "        self._send(lost)\n",
        ("alone",),
    ),
    Mutant("lost messages are found and not sent", DISPATCH, "        self._send(lost)\n", ""),
    Mutant(
        "a run is finished before it is marked",
        FINISH,
        "    mark_complete(",
        "    leases.ledger.close(claim.run_id, claim)\n    mark_complete(",
    ),
    Mutant(
        "a removal is not synced",
        STORE,
        "                os.unlink(path)\n            _sync_folder(os.path.dirname(path))\n",
        "                os.unlink(path)\n",
        ("retry",),
    ),
    Mutant(
        "a lost last step marks the run",
        FINISH,
        "lambda: leases.prove(claim)",
        "lambda: None",
        ("retry",),
    ),
    Mutant(
        "a producer marks a run that is held",
        LUA,
        "return redis.call('EXISTS', prefix .. 'stream:' .. run) == 1",
        "return false",
        ("resume", "stream-resume"),
    ),
    Mutant(
        "an abandoned stream is listed before its hold runs out",
        RECOVERY,
        "    if queue.has_producer(plan.run_id):\n        return replace(plan, shards=tuple(durable_shards(run)[0]))\n"
        "    with queue.held(plan.run_id, run.uri) as prove:\n"
        "        closed = plan.closed(durable_shards(run, prove)[0])",
        "    listed = durable_shards(run)[0]\n    if queue.has_producer(plan.run_id):\n"
        "        return replace(plan, shards=tuple(listed))\n"
        "    with queue.held(plan.run_id, run.uri) as prove:\n"
        "        closed = plan.closed(listed)",
        ("stream-resume",),
    ),
    Mutant(
        "a producer goes on with a stream that was closed",
        BY_REFERENCE,
        'if state not in ("open", "unknown"):',
        "if False:",
        ("stream-resume",),
    ),
    Mutant(
        "the message of a blocked run leaves its shard in no place",
        LUA,
        "    wait(run, shard)\n    return {'blocked'}\n",
        "    return {'blocked'}\n",
        ("blind",),
    ),
    Mutant(
        "a run is evaluated before it is marked",
        FINISH,
        "    mark_complete(",
        "    _evaluate(claim, leases)\n    mark_complete(",
    ),
    Mutant(
        "_SUCCESS comes before the rejects",
        PART,
        "    sink, count = pa.BufferOutputStream(), 0\n",
        '    sink, count = pa.BufferOutputStream(), 0\n    run.write(SUCCESS_FILE, b"")\n',
        ("poison",),
    ),
    Mutant("rejects are not copied", PART, "    if count:\n", "    if False:\n", ("poison",)),
    Mutant("a document may end one process more", POISON, ">= MAX_STRIKES", "> MAX_STRIKES", ("poison",)),
    Mutant("a trial is not noted", POISON, "elif not ledger.probe(claim, trial.name):", "elif False:", ("poison",)),
    Mutant("the last trial stays noted", POISON, "    ledger.probe(claim, None)", "    pass", ("poison",)),
    Mutant(
        "poison is not isolated",
        SHARDS,
        "if claim.attempts <= MAX_ATTEMPTS:\n            with",
        "if True:\n            with",
        ("poison",),
    ),
    Mutant("a part's counts are swapped", PARTS, "part.num_rows - part[", "0 + part["),
    Mutant(
        "a late worker records its own counts",
        PARTS,
        "    return read_committed(run, shard), False\n",
        "    return _committed(stats), False\n",
    ),
    Mutant(
        "the producer does not send again what a broker lost",
        RUN,
        "if is_idle and was_idle and answered == began:",
        "if False:",
    ),
    Mutant(
        "a run that lacks its report is closed",
        RUN,
        "lacks_report = not missing and _lacks_report(run, plan)",
        "lacks_report = False",
        ("alone",),
    ),
    Mutant(
        "a run's last step is due again while a worker is at it",
        LUA,
        "  if redis.call('HEXISTS', key(run, 'leases'), FINISH) + redis.call('HEXISTS', key(run, 'sent'), FINISH) > 0",
        "  if false",
        ("alone",),
    ),
    Mutant("a run is sealed that was cancelled", LUA, "or now == 'cancelled' or not move", "or not move", ("cancel",)),
    Mutant(
        "a report's scores are written before its page",
        REPORT,
        """    run.write(REPORT_HTML, html.encode())
    run.write(REPORT_JSON, (json.dumps(report, indent=1, ensure_ascii=False) + "\\n").encode())
""",
        """    run.write(REPORT_JSON, (json.dumps(report, indent=1, ensure_ascii=False) + "\\n").encode())
    run.write(REPORT_HTML, html.encode())
""",
        ("alone",),
    ),
    Mutant(
        "a run by value is closed by a ledger that lost it",
        BY_VALUE,
        """\
        if lost := (claim.folder.committed() | claim.folder.shards()) - {shard.index for shard in shards}:
            raise MessageError(f"{claim.uri}: has shard {min(lost)}, which the broker lost; give the same input again")
        leases.prove(claim)
""",
        "",
        ("value",),
    ),
    Mutant(
        "documents by value leave Redis before they are in the run's folder",
        BY_VALUE,
        "    data, sha256 = encode_shard(table)\n",
        "    data, sha256 = encode_shard(table)\n"
        "    patiently(lambda: documents.stored(claim, replace(shard, sha256=sha256)))\n",
        ("value",),
    ),
    Mutant(
        "documents by value stay in Redis",
        LUA,
        "  remove_documents(run, shard)\n  return 1\n",
        "  return 1\n",
        ("value",),
    ),
    Mutant(
        "documents by value are taken twice",
        LUA,
        "elseif takes and not is_there(run, shard) then",
        "elseif takes then",
        ("stream-value",),
    ),
    Mutant(
        "a plan by value replaces one that is there",
        BY_VALUE,
        '"{plan_json(opened, indent=1)}\\n".encode(), exclusive=True)',
        '"{plan_json(opened, indent=1)}\\n".encode())',
        ("value",),
    ),
    Mutant(
        "a stream goes on behind a shard that is not synced",
        RECOVERY,
        "        run.sync(run.shard_file(indices[-1]))\n",
        "        pass\n",
        ("stream",),
    ),
    Mutant(
        "a broker that lost a stream is not told of it",
        STREAM,
        "        if self._is_lost():\n",
        "        if False:\n",
        ("stream-value",),
    ),
    Mutant(
        "documents by value that a broker lost are not sent again",
        STREAM_BY_VALUE,
        "            self._unsent.extendleft(reversed(self._offered))\n",
        "",
        ("stream-value",),
    ),
    Mutant("a run is sent again whole", RUN, "if shard.index not in committed]", "]"),
)


def run_mutants(names: list[str] | None, jobs: int, seconds: float) -> int:
    """Explores each mutant for so long at most; prints those that were found, and how; returns the exit code."""
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    begun = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        found = 0
        for mutant, told in zip(chosen, pool.map(lambda mutant: hunt(mutant, seconds), chosen), strict=True):
            found += bool(told)
            print(f"{'found   ' if told else 'SURVIVES'}  {mutant.name}: {told or mutant.file}", flush=True)
    print(f"{found} of {len(chosen)} found in {time.monotonic() - begun:.0f} s")
    return 0 if found == len(chosen) else 1


def hunt(mutant: Mutant, seconds: float) -> str:
    """What the exploration says of a mutant; empty where it finds nothing."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        package = Path(folder) / "nermill"
        package.mkdir()
        (package / "model_build").symlink_to(ROOT / "model_build")
        for room in ("worker", "producer"):
            shutil.copytree(ROOT / room, package / room, ignore=shutil.ignore_patterns("__pycache__"))
        file = package / mutant.file
        text = file.read_text("utf-8")
        if text.count(mutant.old) != 1:
            raise ValueError(
                f"{mutant.name}: the text to replace occurs {text.count(mutant.old)} times in {mutant.file}"
            )
        file.write_text(text.replace(mutant.old, mutant.new), "utf-8")
        command = [sys.executable, "-m", "tests.exploration", "--hunt", "--seconds", str(seconds)]
        command += [word for scenario in mutant.scenarios for word in ("--scenario", scenario)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((folder, str(ROOT))), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"{mutant.name}: {done.stderr[-2000:]}")
        return done.stdout.strip() if done.returncode else ""
