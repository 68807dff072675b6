"""What Prometheus sees of real workers: it adds up to the run, and dashboard and alerts ask for what is there."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from prometheus_client import Histogram
from prometheus_client.parser import text_string_to_metric_families

from nermill.producer.runs.status import look
from nermill.worker.contracts.errors import EngineError
from nermill.worker.contracts.message import KEY_PREFIX
from nermill.worker.engine import Batch
from nermill.worker.process.metrics import FILL_BUCKETS, MeteredEngine
from nermill.worker.tagging.clock import DeviceClock
from tests.doubles.engine import HashEngine, manifest
from tests.harness import Harness, free_port, texts

MIXED = [text if n % 25 else "" for n, text in enumerate(texts(1500))]  # each 25th is rejected
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def scrape(port: int) -> str:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def totals(*scraped: str) -> dict[str, float]:
    """Sums over workers; a sample's key is its name and labels."""
    sums: defaultdict[str, float] = defaultdict(float)
    for text in scraped:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name + "".join(f" {value}" for _, value in sorted(sample.labels.items()))] += sample.value
    return sums


def start(fleet: Harness, workers: int, **environment: str) -> list[int]:
    """Starts workers that listen; returns their ports."""
    ports = [free_port() for _ in range(workers)]
    for port in ports:
        fleet.worker(NERMILL_METRICS_PORT=str(port), **environment)
    deadline = time.monotonic() + 40
    for port in ports:
        while True:
            try:
                scrape(port)
                break
            except OSError:
                assert time.monotonic() < deadline, fleet.logs()
                time.sleep(0.05)
    return ports


def test_what_is_scraped_adds_up_to_what_the_run_says(fleet: Harness) -> None:
    ports = start(fleet, 2, FAULT_BATCH_SECONDS="0.05", NERMILL_CONCURRENCY="2")
    run, plan = fleet.submit(MIXED, documents_per_shard=50)
    seen: list[float] = []
    while len(run.committed()) < len(plan.shards):
        seen.append(totals(*map(scrape, ports))["nermill_documents_total ok"])
        time.sleep(0.1)
    fleet.wait(run, plan)
    assert seen == sorted(seen)
    assert len({count for count in seen if 0 < count < 1440}) > 1, "not scraped while it ran"
    status = look(run, plan)
    found = totals(*map(scrape, ports))
    expected = {
        "documents_total ok": status.ok,
        "documents_total rejected": status.rejected,
        "tokens_total real": status.tokens,
        "tokens_total padding": status.computed_tokens - status.tokens,
        "shard_attempts_total": len(plan.shards),
        "shard_seconds_count": len(plan.shards),
    }
    assert status.rejected == 60
    assert status.computed_tokens > status.tokens
    assert {name: found[f"nermill_{name}"] for name in expected} == pytest.approx(expected, rel=0.01)
    assert found["nermill_redelivered_shards_total"] == 0
    stages = {name: found[f"nermill_stage_seconds_total {name}"] for name in ("read", "tokenize", "wait", "write")}
    assert all(stages.values())
    work = sum(found[f"nermill_stage_seconds_total {name}"] for name in ("compute", "decode")) + sum(stages.values())
    assert work == pytest.approx(found["nermill_shard_seconds_sum"], rel=0.1)
    assert 0 < found["nermill_device_busy_seconds_total"] <= status.seconds * 2 + 1
    batches, fill = found["nermill_batch_fill_ratio_count"], found["nermill_batch_fill_ratio_sum"]
    assert batches > 10
    assert 0.5 < fill / batches <= 1


def test_a_device_with_two_calls_under_way_is_busy_once() -> None:
    fill = Histogram("fill", "…", buckets=FILL_BUCKETS, registry=None)
    engine, clock = MeteredEngine(SlowEngine(manifest()), fill), DeviceClock()

    def run(batch: Batch) -> None:
        clock.measure(lambda: engine.run(batch))

    window = np.array([[1, 1, 1, 0]])
    batch = Batch(window, window, window)
    begun = time.monotonic()
    threads = [threading.Thread(target=run, args=(batch,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(SlowEngine.seconds / 2)
    assert 0 < clock.busy_seconds() <= time.monotonic() - begun
    for thread in threads:
        thread.join()
    took = time.monotonic() - begun
    assert SlowEngine.seconds <= clock.busy_seconds() <= took
    with pytest.raises(EngineError):
        run(Batch(window * 9, window, window))
    after = clock.busy_seconds()
    time.sleep(0.02)
    assert clock.busy_seconds() == after, "idle since the call that failed"
    (family,) = fill.collect()
    sums = {sample.name: sample.value for sample in family.samples}
    assert (sums["fill_count"], sums["fill_sum"]) == (5, 3.75)


class SlowEngine(HashEngine):
    seconds = 0.2

    def run(self, batch: Batch) -> NDArray[np.float32]:
        if (batch.input_ids == 9).any():
            raise EngineError("poison")
        time.sleep(self.seconds)
        return super().run(batch)


def test_waiting_and_leased_shards_are_those_of_the_ledger(fleet: Harness) -> None:
    (port,) = start(fleet, 1, FAULT_BATCH_SECONDS="0.5", NERMILL_CONCURRENCY="2")
    _, plan = fleet.submit(texts(800), documents_per_shard=20)
    deadline = time.monotonic() + 30
    with fleet.queue().ledger() as ledger:
        while True:  # the worker looks at the ledger when it renews its leases
            progress = ledger.progress(plan.run_id)
            found = totals(scrape(port))
            if 0 < progress.waiting == found["nermill_waiting_shards"] and progress.leased == 2:
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert found["nermill_leased_shards"] == found["nermill_fleet_leased_shards"] == 2
    assert found["nermill_healthy"] == 1
    assert found["nermill_broker_memory_bytes"] > 1_000_000
    assert found["nermill_broker_memory_limit_bytes"] > found["nermill_broker_memory_bytes"]


@pytest.mark.slow
def test_a_shard_of_a_dead_worker_is_counted_as_a_redelivery(fleet: Harness) -> None:
    first, second = start(fleet, 2, FAULT_BATCH_SECONDS="0.3", NERMILL_CONCURRENCY="2")
    run, plan = fleet.submit(texts(300), documents_per_shard=20)
    fleet.until(lambda: totals(scrape(first))["nermill_leased_shards"])
    fleet.workers[0].kill()
    fleet.wait(run, plan)
    found = totals(scrape(second))
    assert 1 <= found["nermill_redelivered_shards_total"] <= 2


@pytest.mark.slow
def test_a_message_that_was_lost_is_counted_as_a_recovery(fleet: Harness) -> None:
    (port,) = start(fleet, 1, FAULT_BATCH_SECONDS="0.3", NERMILL_CONCURRENCY="1", NERMILL_LEASE_SECONDS="2")
    run, plan = fleet.submit(texts(200), documents_per_shard=20)
    with fleet.server.client() as client:
        fleet.until(run.committed)
        fleet.until(lambda: any(client.rpop(key) for key in fleet.message_lists(client)))
    fleet.until(lambda: len(run.committed()) == len(plan.shards))
    assert totals(scrape(port))["nermill_recovered_shards_total"] >= 1


def test_messages_that_nobody_received_are_counted_for_whoever_starts_workers(fleet: Harness) -> None:
    run, plan = fleet.submit(texts(100), documents_per_shard=20)
    with fleet.server.client() as client:
        assert client.zcard(f"{KEY_PREFIX}sent") == 1, "one shard of a run that no artifact serves yet"
        fleet.worker()
        fleet.wait(run, plan)
        fleet.until(lambda: client.zcard(f"{KEY_PREFIX}sent") == 0, 10)


def test_messages_are_counted_by_task(fleet: Harness) -> None:
    (port,) = start(fleet, 1)
    run, plan = fleet.submit(texts(60), documents_per_shard=20)
    fleet.wait(run, plan)
    fleet.queue().request(["Ada met Charles in London."] * 3, {}, timeout=20)
    found = totals(scrape(port))
    counted = {name: found[f"nermill_messages_total nermill.{name}"] for name in ("tag_shard", "finish_run")}
    assert counted == {"tag_shard": len(plan.shards), "finish_run": 1}
    assert found["nermill_messages_total nermill.tag_documents"] == 1
    assert found["nermill_request_documents_total"] == 3
    assert found["nermill_unexpected_errors_total"] == found["nermill_refused_messages_total"] == 0


@needs_promtool
@pytest.mark.slow
def test_promtool_finds_the_metrics_well_formed_and_no_label_grows_with_the_data(fleet: Harness) -> None:
    (port,) = start(fleet, 1)
    one = scrape(port)
    run, plan = fleet.submit(texts(200), documents_per_shard=5)
    fleet.wait(run, plan)
    after = scrape(port)
    done = subprocess.run(["promtool", "check", "metrics"], input=after, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(totals(one)) == set(totals(after))
    assert plan.run_id not in after


@pytest.fixture(scope="module")
def dashboard(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / "deploy/grafana/dashboard.json").read_text("utf-8")))


def expressions(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$job", "nermill").replace("$__rate_interval", "10s")
            assert "$" not in expression
            yield panel["title"], expression


def alert_rules(root: Path) -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((root / "deploy/prometheus/alerts.yaml").read_text("utf-8"))["groups"]
    return list(group["rules"])


def test_dashboard_and_alerts_ask_for_metrics_and_labels_that_a_worker_has(
    fleet: Harness, root: Path, dashboard: dict[str, Any]
) -> None:
    (port,) = start(fleet, 1)
    samples = [sample for family in text_string_to_metric_families(scrape(port)) for sample in family.samples]
    names = {sample.name for sample in samples} | {"up"}
    labels = {label for sample in samples for label in sample.labels} | {"job", "instance"}  # Prometheus's own
    values = {(label, value) for sample in samples for label, value in sample.labels.items()}
    asked = [*(e for _, e in expressions(dashboard)), *(rule["expr"] for rule in alert_rules(root))]
    assert len(asked) > 25
    for expression in asked:
        used = set(re.findall(r"\b(?:nermill|process)_\w+|\bup\b", expression))
        assert used, expression
        assert used <= names, expression
        assert set(re.findall(r"(\w+)\s*=~?", expression)) <= labels, expression
        assert {
            label for by in re.findall(r"(?:by|on) \(([\w, ]+)\)", expression) for label in by.split(", ")
        } <= labels
        pairs = {pair for pair in re.findall(r'(\w+)="([^"]*)"', expression) if pair[0] != "job"}
        assert pairs <= values, expression


@contextmanager
def prometheus(root: Path, folder: Path, port: int) -> Iterator[str]:
    """A Prometheus with our configuration and rules, that looks at one worker, faster; yields its address."""
    folder.mkdir()
    shutil.copy(root / "deploy/prometheus/alerts.yaml", folder)
    config = yaml.safe_load((root / "deploy/prometheus/prometheus.yaml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    log = (folder / "log").open("wb")
    with log, subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log) as process:
        try:
            yield f"http://{address}/api/v1"
        finally:
            process.kill()


def ask(url: str, **query: str) -> Any:
    with urlopen(f"{url}?{urlencode(query)}", timeout=10) as answer:
        told = json.load(answer)
    assert told["status"] == "success"
    return told["data"]


def wait_for(api: str, expression: str) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            if ask(f"{api}/query", query=expression)["result"]:
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, expression
        time.sleep(0.1)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
@pytest.mark.slow
def test_every_panel_and_alert_has_an_answer_from_a_real_prometheus(
    fleet: Harness, root: Path, dashboard: dict[str, Any]
) -> None:
    (port,) = start(fleet, 1, FAULT_BATCH_SECONDS="0.02")
    with prometheus(root, fleet.folder / "prometheus", port) as api:
        wait_for(api, 'up{job="nermill"} == 1')
        run, plan = fleet.submit(MIXED, documents_per_shard=50)
        fleet.wait(run, plan)
        wait_for(api, f"nermill_shard_seconds_count == {len(plan.shards)}")
        for title, expression in expressions(dashboard):
            result = ask(f"{api}/query", query=expression)["result"]
            assert result, (title, expression)
            assert all(math.isfinite(float(series["value"][1])) for series in result), (title, expression)
        (job,) = [v for v in dashboard["templating"]["list"] if v["name"] == "job"]
        metric = re.fullmatch(r"label_values\((\w+), job\)", job["definition"])
        assert metric
        assert ask(f"{api}/label/job/values", **{"match[]": metric[1]}) == ["nermill"]
        (group,) = ask(f"{api}/rules")["groups"]
        assert {rule["name"]: rule["health"] for rule in group["rules"]} == {
            rule["alert"]: "ok" for rule in alert_rules(root)
        }


@needs_promtool
def test_promtool_accepts_the_alerts_and_each_fires_when_it_should(root: Path) -> None:
    folder = root / "deploy/prometheus"
    for command in (["check", "config", "prometheus.yaml"], ["check", "rules", "alerts.yaml"]):
        done = subprocess.run(["promtool", *command], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    tests = ["promtool", "test", "rules", "alerts.test.yaml"]
    done = subprocess.run(tests, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = yaml.safe_load((folder / "alerts.test.yaml").read_text("utf-8"))
    cases = [case for test in content["tests"] for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in alert_rules(root)}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names
