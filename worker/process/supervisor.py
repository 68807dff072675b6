"""Supervises one worker process for each device: starts it, kills it when it hangs, starts it again when it ends."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from nermill.worker.contracts.command import python_command, start_child
from nermill.worker.contracts.device import Device
from nermill.worker.contracts.errors import UsageError
from nermill.worker.process import health
from nermill.worker.process.health import Heartbeat, Notifier
from nermill.worker.process.logs import about
from nermill.worker.process.settings import Settings

log = logging.getLogger("nermill.worker")

APP = "nermill.worker.app"
PIN_VARIABLES = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
RESTART_SECONDS = (0.5, 30.0)  # first and longest pause before a process that ended is started again
STEADY_SECONDS = 60.0  # the pause is reset for a process that ran this long
START_SECONDS = 600.0  # longest time from the start of a process to its first heartbeat
SILENT_SECONDS = 5.0  # unhealthy after so long without a heartbeat; killed after NERMILL_HANG_SECONDS more
TICK_SECONDS = 0.1


def environment_of(device: Device, index: int, settings: Settings) -> dict[str, str]:
    """Environment variables of the process that uses a device, which then sees this device alone, with number 0.

    Args:
        device: The device as the operator names it.
        index: Position in ``--devices``; added to the metrics port.
        settings: For the metrics port.
    """
    variables = {
        "NERMILL_DEVICE": Device(device.kind).name,
        "NERMILL_DEVICE_NAME": device.name,
        "TOKENIZERS_PARALLELISM": "true",
    }
    if device.kind in PIN_VARIABLES:
        variables[PIN_VARIABLES[device.kind]] = str(device.number)
    if settings.metrics_port:
        variables["NERMILL_METRICS_PORT"] = str(settings.metrics_port + index)
    return variables


class Supervised:
    """One device's process and its heartbeat.

    Args:
        device: The device.
        index: Its position in ``--devices``.
        settings: The process's settings.
        cores: CPU cores that the process may use.
    """

    def __init__(self, device: Device, index: int, settings: Settings, cores: frozenset[int]) -> None:
        self.device = device
        self.started = time.monotonic()
        self.is_killed = False
        self.heartbeat = Heartbeat()
        environment = {
            **os.environ,
            **environment_of(device, index, settings),
            health.VARIABLE: str(self.heartbeat.writer),
        }
        self.process = start_child(
            _command(device),
            cores=cores,
            env=environment,
            # Logs go to standard error. Celery prints a line that is no JSON to standard output when it ends.
            stdout=subprocess.DEVNULL if settings.log_format == "json" else None,
            pass_fds=[self.heartbeat.writer],
        )
        self.heartbeat.close_writer()

    @property
    def is_healthy(self) -> bool:
        """Whether there was a heartbeat in the last SILENT_SECONDS, or the model may still be loading."""
        return not self.is_killed and (not self.heartbeat.received or self.heartbeat.silent_seconds() < SILENT_SECONDS)

    def end_if_silent(self, hang_seconds: float) -> None:
        """Kills the process if it sends no heartbeats for too long: all its threads hang, or its model never loads.

        Args:
            hang_seconds: How long a call of the engine may take; a process that can still run code ends by itself then.
        """
        silent = self.heartbeat.silent_seconds()
        limit = hang_seconds + SILENT_SECONDS if self.heartbeat.received else START_SECONDS
        if silent > limit and not self.is_killed:
            self.is_killed = True
            with about(device=self.device.name):
                log.critical("%s: no heartbeat from the worker for %.0f s; it is killed", self.device.name, silent)
            self.process.kill()


class Supervisor:
    """Keeps one Celery process for each device running.

    - A process that ends is started again after a pause, which doubles while the process runs for a short time only.
    - A process that sends no heartbeats is killed, and then started again.
    - A process that refuses its settings (exit code 2) ends the supervisor, which stops the others.
    - A process that Celery's remote control shut down (exit code 0) is not started again; when all were, the
      supervisor ends.
    """

    def __init__(self, devices: list[Device], settings: Settings) -> None:
        self._devices = devices
        self._cores = cores_of(devices)
        self._settings = settings
        self._processes: dict[int, Supervised] = {}
        self._pause: dict[int, float] = {}
        self._failed_starts: dict[int, int] = dict.fromkeys(range(len(devices)), 0)
        self._due: dict[int, float] = dict.fromkeys(range(len(devices)), 0.0)
        self._stopped = 0  # devices whose process was told to shut down
        self._stopping = False
        self._ready = False
        self._systemd = Notifier(os.environ)

    def run(self) -> int:
        """Supervises until SIGTERM or SIGINT, or until no process is left; returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        code = 0
        while self._processes or (self._due and not self._stopping):
            self._start_due()
            time.sleep(TICK_SECONDS)
            for index, supervised in list(self._processes.items()):
                status = supervised.process.poll()
                if status is None:
                    supervised.end_if_silent(self._settings.hang_seconds)
                    continue
                del self._processes[index]
                supervised.heartbeat.close()
                if not self._stopping:
                    self._failed_starts[index] += not supervised.heartbeat.received
                    if status == UsageError.exit_code or self._has_failed_to_start(index):
                        code = status
                        self._stop()
                    elif status == 0:
                        self._note_shutdown(supervised)
                    else:
                        self._plan_restart(index, supervised, status)
            self._notify_systemd()
        return code

    def _start_due(self) -> None:
        for index, due in list(self._due.items()):
            if self._stopping or time.monotonic() < due:
                continue
            del self._due[index]
            supervised = Supervised(self._devices[index], index, self._settings, self._cores[index])
            self._processes[index] = supervised
            if self._stopping:  # a signal came while the process was being started
                supervised.process.send_signal(signal.SIGTERM)

    def _has_failed_to_start(self, index: int) -> bool:
        return 0 < self._settings.start_attempts <= self._failed_starts[index]

    def _note_shutdown(self, supervised: Supervised) -> None:
        self._stopped += 1
        with about(device=supervised.device.name):
            log.info("%s: the worker was told to shut down; it is not started again", supervised.device.name)

    def _plan_restart(self, index: int, supervised: Supervised, status: int) -> None:
        shortest, longest = RESTART_SECONDS
        lived = time.monotonic() - supervised.started
        pause = shortest if lived > STEADY_SECONDS else self._pause.get(index, shortest)
        self._pause[index] = min(longest, pause * 2)
        self._due[index] = time.monotonic() + pause
        name = supervised.device.name
        with about(device=name):
            log.error("%s: the worker ended with %d; starting it again in %.1f s", name, status, pause)

    def _notify_systemd(self) -> None:
        """Sends READY=1 once all processes have sent a heartbeat, and feeds the watchdog while all are healthy."""
        processes = self._processes.values()
        if (
            not self._ready
            and len(processes) + self._stopped == len(self._devices)
            and all(p.heartbeat.received for p in processes)
        ):
            self._ready = True
            self._systemd.notify("READY=1")
        if all(supervised.is_healthy for supervised in processes):
            self._systemd.feed_watchdog()

    def _stop(self, *_: object) -> None:
        self._stopping = True
        self._systemd.notify("STOPPING=1")
        for supervised in self._processes.values():
            supervised.process.send_signal(signal.SIGTERM)


def _command(device: Device) -> list[str]:
    celery = ["--quiet", "worker", "--pool", "threads", "--loglevel", "INFO"]
    alone = ["--without-gossip", "--without-mingle"]  # worker processes exchange nothing with each other
    name = f"nermill-{device.kind}{device.number}-{os.getpid()}@%h"
    return python_command(APP, *celery, *alone, "-n", name)


def cores_of(devices: Sequence[Device]) -> list[frozenset[int]]:
    """The cores that each device's process may use: all of them, except that CPU devices divide them among themselves.

    Each CPU device gets neighbouring cores of one socket as far as possible: with as many CPU devices as sockets, each
    gets one socket.
    """
    cores = sorted(os.sched_getaffinity(0), key=lambda core: (_socket_of(core), core))
    computing = [index for index, device in enumerate(devices) if device.kind == "cpu"]
    shares = {
        index: cores[nth * len(cores) // len(computing) : (nth + 1) * len(cores) // len(computing)]
        for nth, index in enumerate(computing)
    }
    return [frozenset(shares.get(index) or cores) for index in range(len(devices))]


def _socket_of(core: int) -> int:
    try:
        return int(Path(f"/sys/devices/system/cpu/cpu{core}/topology/physical_package_id").read_text("ascii"))
    except (OSError, ValueError):
        return 0
