"""What a worker says of itself: JSON logs that know run and shard, and OpenTelemetry spans for those who want them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from nermill.worker.contracts.broker import celery_app
from nermill.worker.contracts.dispatch import Dispatcher
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.manifest import TOKENIZER_FILE, resolve_artifact
from nermill.worker.contracts.plan import Plan
from nermill.worker.process import logs, tracing
from nermill.worker.process.metrics import Metrics
from nermill.worker.process.settings import Settings
from nermill.worker.queue.shards import ShardWorker
from nermill.worker.tagging.pipeline import Pipeline
from tests.doubles.engine import HashEngine, manifest
from tests.harness import Harness, child, texts

LAUNCH = [sys.executable, "-m", "tests.doubles.launch", "--devices", "cpu"]
NEVER = "Secret document text"


def launch(fleet: Harness, *arguments: str, **environment: str) -> AbstractContextManager[subprocess.Popen[str]]:
    settings = {
        "NERMILL_BROKER_URL": fleet.server.url,
        "NERMILL_ALLOWED_ROOTS": str(fleet.out),
        "NERMILL_LEASE_SECONDS": "2",
    }
    return child([*LAUNCH, *arguments], {**settings, **environment}, stderr=subprocess.STDOUT)


def test_json_logs_are_one_object_a_line_with_run_shard_device_and_worker(fleet: Harness) -> None:
    with launch(fleet, "--log-format", "json") as process:
        run, plan = fleet.submit([*texts(100), "", f"{NEVER} {'x' * 100}"], documents_per_shard=51)
        fleet.wait(run, plan)
        _, broken = fleet.submit(texts(10), out=str(fleet.folder / "elsewhere"))
        with fleet.queue().ledger() as ledger:
            fleet.until(lambda: ledger.progress(broken.run_id).quarantined)
        process.terminate()
        out, _ = process.communicate(timeout=40)
    assert NEVER not in out
    entries = [json.loads(line) for line in out.splitlines()]
    assert all({"time", "level", "logger", "message"} <= entry.keys() for entry in entries)
    about_run = [entry for entry in entries if entry.get("run") == plan.run_id]
    done = {entry["shard"]: entry for entry in about_run if "documents in" in entry["message"]}
    assert sorted(done) == [0, 1]
    for entry in done.values():
        assert (entry["level"], entry["device"], entry["attempt"]) == ("info", "cpu", 1)
        assert entry["worker"].startswith("nermill-cpu@")
        assert "trace" not in entry
    (refused,) = [entry for entry in entries if entry.get("run") == broken.run_id]
    assert refused["level"] == "warning"
    assert "outside the allowed roots" in refused["message"]


def test_a_refusal_is_json_where_logs_are(fleet: Harness) -> None:
    with launch(fleet, "--log-format", "json", "--model", "/nowhere") as process:
        out, _ = process.communicate(timeout=40)
    assert process.returncode == 2
    (entry,) = [json.loads(line) for line in out.splitlines()]
    assert (entry["level"], entry["message"].partition(":")[0]) == ("critical", "/nowhere")


def test_a_traceback_is_a_member_of_its_object(capsys: pytest.CaptureFixture[str]) -> None:
    formatter = logs.JsonFormatter(device="npu:3")
    log = logging.getLogger("nermill.test")
    try:
        raise ValueError("zwölf\nlines")
    except ValueError as error:
        record = log.makeRecord("nermill.test", 40, "f", 1, "failed on %s", ("x",), (ValueError, error, None))
    with logs.about(run="abc", shard=3), logs.about(attempt=2):
        line = formatter.format(record)
    assert "\n" not in line
    entry = json.loads(line)
    assert entry["message"] == "failed on x"
    assert entry["traceback"] == "ValueError: zwölf\nlines"
    assert (entry["device"], entry["run"], entry["shard"], entry["attempt"]) == ("npu:3", "abc", 3, 2)
    assert "run" not in json.loads(formatter.format(record))


@pytest.fixture
def waiting(fleet: Harness) -> Iterator[tuple[ShardWorker, RunFolder, Plan]]:
    """A worker in this process, and a run of three shards that waits for it; one document is empty."""
    tokenizer = Tokenizer.from_file(str(resolve_artifact("demo") / TOKENIZER_FILE))
    with fleet.server.client() as client:
        pipeline = Pipeline(HashEngine(manifest()), tokenizer)
        settings = Settings(allowed_roots=str(fleet.out))
        ledger = Ledger(client)
        dispatcher = Dispatcher(celery_app(fleet.server.url), ledger)
        made = ShardWorker(pipeline, ledger, dispatcher, settings, Metrics())
        run, plan = fleet.plan([*texts(20), ""], documents_per_shard=7)
        ledger.open(plan.run_id, run.uri, plan.options)
        ledger.add(plan.run_id, plan.shards)
        yield made, run, plan
        pipeline.close()


def test_each_shard_is_a_span_that_says_what_it_came_to(waiting: tuple[ShardWorker, RunFolder, Plan]) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    made, run, plan = waiting
    spans = InMemorySpanExporter()
    tracing.start(SimpleSpanProcessor(spans), "worker-7", "cpu")
    try:
        states = [made.tag_shard("id", plan.run_id, run.uri, index)["state"] for index in range(3)]
        assert made.finish_run(plan.run_id, run.uri)["state"] == "complete"
    finally:
        tracing.stop()
    assert states == ["committed"] * 3
    found: dict[Any, Any] = {span.attributes["nermill.shard"]: span for span in spans.get_finished_spans()}
    assert set(found) == {"0", "1", "2", "finish"}
    for index in "012":
        attributes = dict(found[index].attributes)
        assert (attributes["nermill.run"], attributes["nermill.attempt"]) == (plan.run_id, 1)
        assert (attributes["nermill.documents"], attributes["nermill.rejected"]) == (7, int(index == "2"))
        assert attributes["nermill.computed_tokens"] >= attributes["nermill.tokens"] > 0
        assert found[index].resource.attributes["service.instance.id"] == "worker-7"
        assert found[index].end_time > found[index].start_time
    assert len({span.context.trace_id for span in found.values()}) == 4


def test_a_shard_that_fails_is_a_span_with_its_error(waiting: tuple[ShardWorker, RunFolder, Plan]) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    made, run, plan = waiting
    shard = Path(run.path(run.shard_file(0)))
    shard.write_bytes(shard.read_bytes()[:-9])
    spans = InMemorySpanExporter()
    tracing.start(SimpleSpanProcessor(spans), "worker-7", "cpu")
    try:
        assert made.tag_shard("id", plan.run_id, run.uri, 0)["state"] == "refused"
    finally:
        tracing.stop()
    (span,) = spans.get_finished_spans()
    assert span.status.status_code.name == "ERROR"
    assert span.status.description


def test_without_an_endpoint_nothing_of_opentelemetry_is_imported() -> None:
    """Nothing by us: redis-py looks for what it knows of it, where that is installed."""
    code = (
        "import sys, os; from nermill.worker.process import tracing; tracing.start_from(os.environ, 'w', 'cpu');"
        "import nermill.worker.queue.shards;"
        "print([m for m in sys.modules if m.startswith(('opentelemetry.sdk.trace', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_endpoint_without_the_library_is_one_line(fleet: Harness, tmp_path: Path) -> None:
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").write_text("raise ModuleNotFoundError(name='opentelemetry')")
    lacking = {"PYTHONPATH": str(tmp_path), "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    with launch(fleet, **lacking) as process:
        out, _ = process.communicate(timeout=40)
    assert process.returncode == 2
    assert out.strip().splitlines()[-1].endswith("opentelemetry is missing: pip install nermill[otel]")


class Collector(BaseHTTPRequestHandler):
    """Takes OTLP over HTTP, as a collector would."""

    bodies: list[bytes]

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_worker_sends_its_spans_to_a_collector(fleet: Harness) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    bodies: list[bytes] = []
    with HTTPServer(("127.0.0.1", 0), type("Collector", (Collector,), {"bodies": bodies})) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}"
        with launch(fleet, "--log-format", "json", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, no_proxy="*") as process:
            run, plan = fleet.submit(texts(30), documents_per_shard=10)
            fleet.wait(run, plan)
            process.terminate()
            out, _ = process.communicate(timeout=40)
        collector.shutdown()
    spans = [
        span
        for body in bodies
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert [span.name for span in spans] == ["nermill.shard"] * 4
    entries = [json.loads(line) for line in out.splitlines()]
    logged = {entry["trace"] for entry in entries if "documents in" in entry["message"]}
    assert logged <= {span.trace_id.hex() for span in spans}
    assert len(logged) == 3
