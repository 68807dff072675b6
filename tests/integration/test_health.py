"""Whether a worker is well: a device that hangs, one that is busy, a process that stands still, and who is told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from nermill.worker.contracts.device import Device
from nermill.worker.process import health, supervisor
from nermill.worker.process.settings import Settings
from nermill.worker.process.supervisor import SILENT_SECONDS
from tests.harness import Harness, free_port, rows, texts

HANG_SECONDS = 2.0


class Launcher:
    """``nermill-worker`` on one device, around the double."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log

    def health(self) -> int:
        """Status of /healthz; 0 where nobody answers."""
        try:
            with urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=2) as answer:
                return int(answer.status)
        except HTTPError as error:
            return error.code
        except OSError:
            return 0

    def worker(self) -> int:
        """Process id of the worker process; 0 while there is none."""
        pid = self.process.pid
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(listed[0]) if listed else 0

    def until(self, condition: Callable[[], object], seconds: float = 40.0) -> float:
        """Waits for something; returns how long it took."""
        begun = time.monotonic()
        while not condition():
            assert time.monotonic() < begun + seconds, self.log.read_text()[-4000:]
            time.sleep(0.02)
        return time.monotonic() - begun


@contextmanager
def launcher(
    fleet: Harness, port: int = 0, *, ready: bool = True, environment: Mapping[str, str] | None = None
) -> Iterator[Launcher]:
    """Starts one; waits until it is ready, unless told otherwise."""
    port, log = port or free_port(), fleet.folder / "launcher.log"
    settings = {
        "NERMILL_BROKER_URL": fleet.server.url,
        "NERMILL_ALLOWED_ROOTS": str(fleet.out),
        "NERMILL_METRICS_PORT": str(port),
        "NERMILL_HANG_SECONDS": str(HANG_SECONDS),
        "NERMILL_LEASE_SECONDS": "3",
        "OMP_NUM_THREADS": "1",
        **(environment or {}),
    }
    command = [sys.executable, "-m", "tests.doubles.launch", "--devices", "cpu"]
    with (
        log.open("wb") as file,
        subprocess.Popen(command, env={**os.environ, **settings}, stdout=file, stderr=file) as process,
    ):
        made = Launcher(process, port, log)
        try:
            if ready:
                made.until(lambda: made.health() == 200)
            yield made
        finally:
            process.terminate()
            process.wait(40)


@pytest.mark.slow
def test_a_worker_whose_engine_hangs_says_so_and_is_replaced(fleet: Harness) -> None:
    once = {"FAULT_HANG_WORD": "poison", "FAULT_ONCE_FILE": str(fleet.folder / "hung")}
    with launcher(fleet, environment=once) as made:
        first = made.worker()
        run, plan = fleet.submit(["A poison comes to London.", *texts(63)])
        made.until(lambda: (fleet.folder / "hung").exists())
        assert made.until(lambda: made.health() != 200) < HANG_SECONDS + 2
        made.until(lambda: made.worker() not in (0, first))
        made.until(lambda: made.health() == 200)
        fleet.wait(run, plan)
        assert len(rows(run)) == 64
        assert "the device has not answered for" in made.log.read_text()


def test_a_worker_is_unhealthy_while_a_call_of_the_device_is_overdue() -> None:
    """What a probe sees in the second before the process ends itself, held still."""
    from nermill.worker.process.metrics import Metrics, serve

    problem: list[str] = []
    port = free_port()
    serve(Metrics(), port, lambda: problem[0] if problem else None)
    assert urlopen(f"http://127.0.0.1:{port}/healthz").read() == b"ok\n"
    problem.append("the device has not answered for 3 s")
    with pytest.raises(HTTPError) as caught:
        urlopen(f"http://127.0.0.1:{port}/healthz")
    assert (caught.value.code, caught.value.read()) == (503, b"the device has not answered for 3 s\n")
    caught.value.close()


@pytest.mark.parametrize(
    ("faults", "documents"),
    [
        ({"FAULT_BATCH_SECONDS": str(HANG_SECONDS * 0.6)}, texts(120)),
        ({"FAULT_BATCH_SECONDS": "0.3", "FAULT_REFUSE_WORD": "poison"}, ["A poison comes to London.", *texts(40)]),
    ],
    ids=["slow", "running a failed batch again in parts"],
)
@pytest.mark.slow
def test_a_busy_worker_stays_healthy(fleet: Harness, faults: dict[str, str], documents: list[str]) -> None:
    with launcher(fleet, environment=faults) as made:
        first = made.worker()
        run, plan = fleet.submit(documents)
        health = set()
        while len(run.committed()) < len(plan.shards):
            health.add(made.health())
            time.sleep(0.05)
        fleet.wait(run, plan)
        assert health == {200}
        assert made.worker() == first
        (busy,) = [line for line in scrape(made.port) if line.startswith("nermill_device_busy_seconds_total")]
        assert float(busy.split()[1]) > HANG_SECONDS, "the run did not keep the device busy for long enough"


def scrape(port: int) -> list[str]:
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return str(answer.read().decode()).splitlines()


def test_clients_that_say_nothing_do_not_keep_a_probe_waiting(fleet: Harness) -> None:
    with launcher(fleet) as made, ExitStack() as silent:
        for _ in range(8):
            silent.enter_context(socket.create_connection(("127.0.0.1", made.port)))
        assert made.health() == 200


@pytest.mark.slow
def test_a_process_that_stands_still_is_killed_and_replaced_and_systemd_is_not_told_that_all_is_well(
    fleet: Harness,
) -> None:
    with ExitStack() as stack:
        systemd = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        systemd.bind(str(fleet.folder / "notify"))
        systemd.setblocking(False)
        told: list[tuple[float, str]] = []

        def heard() -> list[tuple[float, str]]:
            with suppress(BlockingIOError):
                while True:
                    told.append((time.monotonic(), systemd.recv(256).decode()))
            return told

        variables = {"NOTIFY_SOCKET": str(fleet.folder / "notify"), "WATCHDOG_USEC": "400000"}
        made = stack.enter_context(launcher(fleet, environment=variables))
        made.until(lambda: "READY=1" in [state for _, state in heard()])
        first = made.worker()
        os.kill(first, signal.SIGSTOP)
        stopped = time.monotonic()
        made.until(lambda: heard() and made.worker() != first)
        killed = time.monotonic()
        assert killed - stopped < HANG_SECONDS + SILENT_SECONDS + 3
        assert f"no heartbeat from the worker for {HANG_SECONDS + SILENT_SECONDS:.0f} s" in made.log.read_text()
        fed = [moment for moment, state in told if state == "WATCHDOG=1"]
        assert any(moment < stopped for moment in fed)
        assert not [moment for moment in fed if stopped + SILENT_SECONDS + 0.5 < moment < killed - 0.2]
        made.until(lambda: heard()[-1][0] > killed and made.health() == 200)
        made.process.terminate()
        made.process.wait(40)
        heard()
        assert [state for _, state in told].count("READY=1") == 1
        assert {state for _, state in told} == {"READY=1", "WATCHDOG=1", "STOPPING=1"}


def test_a_process_that_never_loads_its_model_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "START_SECONDS", 0.3)
    monkeypatch.setattr(supervisor, "_command", lambda device: ["sleep", "60"])
    device = Device("cpu")
    supervised = supervisor.Supervised(device, 0, Settings(), *supervisor.cores_of([device]))
    supervised.end_if_silent(HANG_SECONDS)
    assert supervised.is_healthy
    assert supervised.process.poll() is None
    time.sleep(0.4)
    supervised.end_if_silent(HANG_SECONDS)
    assert not supervised.is_healthy
    assert supervised.process.wait(10) == -signal.SIGKILL
    supervised.heartbeat.close()


def test_heartbeats_are_sent_while_there_is_no_problem_and_somebody_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "HEARTBEAT_SECONDS", 0.05)
    problem: list[str] = ["the device has not answered"]
    pipe = health.Heartbeat()
    environment = {health.VARIABLE: str(pipe.writer)}
    process = threading.Thread(
        target=health.send_heartbeats, args=(environment, lambda: "".join(problem) or None, threading.Event())
    )
    process.start()
    time.sleep(0.2)
    assert pipe.silent_seconds() > 0.15
    assert not pipe.received
    problem.clear()
    time.sleep(0.2)
    assert pipe.silent_seconds() < 0.15
    assert pipe.received
    pipe.close()
    process.join(5)
    assert not process.is_alive()


def test_a_port_that_is_taken_is_one_line_and_tried_again(fleet: Harness) -> None:
    with socket.socket() as taken, ExitStack() as stack:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        made = stack.enter_context(launcher(fleet, port, ready=False))
        line = f"nermill-worker: metrics port {port}: [Errno 98] Address already in use; choose another"
        made.until(lambda: line in made.log.read_text())
        assert "Traceback" not in made.log.read_text()
        taken.close()
        made.until(lambda: made.health() == 200)
