"""Test harness: a real server, real worker processes and real files, all of which a test may kill or damage."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from celery import Celery
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from nermill.producer.local.broker import find_server_binary
from nermill.producer.runs.planning import Request, make_plan
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.run import send, wait
from nermill.producer.runs.shards import ShardLimits
from nermill.producer.runs.status import Status
from nermill.worker.contracts.broker import redis_client
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.part import open_part, read_columns
from nermill.worker.contracts.plan import Plan
from tests.forks import Fork

ROOT = Path(__file__).parents[1]
DOUBLE = "tests.doubles.app"
REAL = "nermill.worker.app"


class Server:
    """A Valkey server with an append-only file on a Unix socket; it can be killed and started again.

    Args:
        folder: Empty folder; its path must be short enough for a socket.
        options: Further command-line options of the server, such as a port.
        password: The server's password; empty for none.
        within: Prefix of the server's command line, such as a command that enters another host.
    """

    def __init__(
        self, folder: Path, options: Sequence[str] = (), password: str = "", within: Sequence[str] = ()
    ) -> None:
        self.folder = folder
        self.socket = folder / "s"
        self.url = f"redis+socket://{f':{password}@' if password else ''}{self.socket}"
        self._options = [*options, *(["--requirepass", password] if password else [])]
        self._within = within
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        socket = ["--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700"]
        durable = ["--dir", str(self.folder), "--save", "", "--appendonly", "yes", "--appendfsync", "everysec"]
        command = [*self._within, str(find_server_binary()), *socket, *durable, *self._options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with self.client() as client:
            deadline = time.monotonic() + 20
            while True:
                try:
                    client.ping()
                    return
                except (RedisConnectionError, OSError):
                    assert time.monotonic() < deadline, "the server does not come up"
                    time.sleep(0.02)

    def client(self) -> Redis:
        return redis_client(self.url)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


class Worker:
    """One Celery worker process as ``nermill-worker`` starts it; it can be stopped, killed and started again."""

    def __init__(self, app: str, environment: dict[str, str], log: Path, within: Sequence[str] = ()) -> None:
        options = ["--pool", "threads", "--loglevel", "INFO", "--without-gossip", "--without-mingle"]
        self._arguments = ["-A", app, "worker", *options, "--without-heartbeat"]
        self._within = within
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.log = log
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.process: Fork | subprocess.Popen[bytes]
        if not self._within:
            self.process = Fork("celery", self._arguments, self._environment, ROOT, self.log)
            return
        command = [*self._within, sys.executable, "-m", "celery", *self._arguments]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=self._environment, cwd=ROOT, stdout=log, stderr=log)

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def await_ready(self, timeout: float = 60) -> None:
        """Waits until the worker has loaded its model and receives messages."""
        deadline = time.monotonic() + timeout
        while " ready: " not in (told := self.log.read_text()):
            assert self.is_alive, told
            assert time.monotonic() < deadline, told
            time.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        if self.is_alive:
            self.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def terminate(self, timeout: float = 40) -> int:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        return self.process.wait(timeout)


class Harness:
    """A server and workers around one output folder.

    Args:
        folder: Empty folder; its path must be short enough for a socket.
        lease_seconds: Lease of every worker.
        server: Options of the Server.
    """

    def __init__(self, folder: Path, lease_seconds: float = 3.0, **server: Any) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.out.mkdir()
        self.lease_seconds = lease_seconds
        (folder / "server").mkdir()
        self.server = Server(folder / "server", **server)
        self.workers: list[Worker] = []

    def worker(self, app: str = DOUBLE, *, within: Sequence[str] = (), **environment: str) -> Worker:
        """Starts a worker.

        Args:
            app: Module of the Celery application.
            within: Prefix of the command line, such as a command that enters another host.
            environment: Environment variables of the worker.
        """
        settings = {
            "NERMILL_BROKER_URL": self.server.url,
            "NERMILL_LEASE_SECONDS": str(self.lease_seconds),
            "NERMILL_ALLOWED_ROOTS": str(self.out),
        }
        log = self.folder / f"worker-{len(self.workers)}.log"
        self.workers.append(Worker(app, settings | environment, log, within))
        return self.workers[-1]

    def plan(self, texts: list[str], *, documents_per_shard: int = 64, out: str = "") -> tuple[RunFolder, Plan]:
        """Plans a run over texts, with ids d0, d1, …"""
        limits = ShardLimits(documents=documents_per_shard)
        return make_plan(Request((str(self.source(texts)),), out or str(self.out), limits=limits))

    def source(self, texts: list[str]) -> Path:
        """Writes texts into an input file."""
        source = self.folder / "documents.jsonl"
        source.write_text("".join(json.dumps({"id": f"d{n}", "text": t}) + "\n" for n, t in enumerate(texts)), "utf-8")
        return source

    def queue(self) -> Queue:
        return Queue(self.server.url)

    def app(self) -> Celery:
        """A Celery application that knows only the broker's URL."""
        return Celery(broker=self.server.url, backend=self.server.url, set_as_current=False)

    def message_lists(self, client: Redis) -> list[str]:
        """Keys of the lists of messages, of all queues and priorities."""
        return [str(key) for key in client.keys("nermill*") if client.type(key) == "list"]

    def submit(self, texts: list[str], **options: Any) -> tuple[RunFolder, Plan]:
        """Plans a run and sends it."""
        run, plan = self.plan(texts, **options)
        send(run, plan, self.queue())
        return run, plan

    def ask(self, *command: str) -> tuple[int, dict[str, Any]]:
        """A ``nermill`` command's exit code and ``--json``."""
        line = [sys.executable, "-m", "nermill.producer.cli", *command, "--broker", self.server.url, "--json"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=100, check=False)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    @contextmanager
    def submitting(
        self, texts: list[str], *options: str, url: str = "", within: Sequence[str] = ()
    ) -> Iterator[subprocess.Popen[str]]:
        """Runs ``nermill submit --wait`` as a process.

        Args:
            texts: The documents.
            url: Broker URL; empty for the server's own.
            within: Prefix of the command line, such as a command that enters another host.
        """
        command = [
            sys.executable,
            "-m",
            "nermill.producer.cli",
            "submit",
            str(self.source(texts)),
            "--out",
            str(self.out),
        ]
        with (
            (self.folder / "producer.log").open("wb") as log,
            subprocess.Popen(
                [*within, *command, *options, "--shard-documents", "64", "--wait", "--json"],
                env={**os.environ, "NERMILL_BROKER_URL": url or self.server.url},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            ) as process,
        ):
            try:
                yield process
            except BaseException:  # leaving the block waits for the process to end
                process.kill()
                raise

    def run_at_work(self) -> RunFolder:
        """Waits until the run of ``submitting`` has been sent and has its first part; returns its folder."""
        self.until(lambda: "documents" in (self.folder / "producer.log").read_text())
        self.until(lambda: any(self.out.glob("run=*/part-*.parquet")))
        (run,) = self.out.glob("run=*")
        return RunFolder(str(run))

    def until(self, happened: Callable[[], object], timeout: float = 120) -> float:
        """Waits until a function returns a true value; returns the seconds that it took."""
        began = time.monotonic()
        while not happened():
            assert time.monotonic() < began + timeout, self.logs()
            time.sleep(0.02)
        return time.monotonic() - began

    def wait(self, run: RunFolder, plan: Plan, timeout: float = 90) -> Status:
        """Waits for the end of a run; fails with the logs of the workers after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout

        def check(status: Status) -> None:
            if time.monotonic() > deadline:
                raise AssertionError(f"not complete in {timeout} s: {status}\n{self.logs()}")

        return wait(run, plan, self.queue(), check)

    def logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.server.kill()


@contextmanager
def harness(folder: Path, **options: Any) -> Iterator[Harness]:
    made = Harness(folder, **options)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def child(command: Sequence[str], environment: Mapping[str, str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process whose standard output is read as text; it is killed at the end of the block.

    Args:
        command: Its command line.
        environment: Its environment variables beside those of this process.
        options: Others of ``subprocess.Popen``.
    """
    variables = {**os.environ, **environment}
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def free_port() -> int:
    """A free TCP port of this machine."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def table_of(run: RunFolder, plan: Plan) -> pa.Table:
    """The rows of all parts as one table, in the plan's order, without the parts' metadata."""
    tables = []
    for shard in plan.shards:
        with open_part(run, shard.index) as part:
            tables.append(read_columns(run, part))
    return pa.concat_tables([table.replace_schema_metadata(None) for table in tables])


def rows(run: RunFolder) -> list[dict[str, Any]]:
    """All rows of all parts, in order of the parts."""
    tables = [pq.read_table(run.path(name)) for name in run.list() if name.startswith("part-")]
    return [row for table in tables for row in table.to_pylist()]


def texts(count: int) -> list[str]:
    """Short documents, all different."""
    return [f"Document {n}: Ada met Charles {n % 97} in London, {n % 13} miles from Turin." for n in range(count)]
