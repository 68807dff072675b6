"""Keeps one worker process a device alive: starts it, ends it when its heartbeat stops, starts it anew."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nermill.worker.contracts.command import end_with_parent, python_command
from nermill.worker.contracts.device import Device
from nermill.worker.contracts.errors import UsageError
from nermill.worker.process import health
from nermill.worker.process.health import Heartbeat, Notifier
from nermill.worker.process.logs import about
from nermill.worker.process.settings import Settings

log = logging.getLogger("nermill.worker")

APP = "nermill.worker.app"
PIN_VARIABLES = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
RESTART_SECONDS = (0.5, 30.0)  # first and longest pause before a process that died is started again
STEADY_SECONDS = 60.0  # a process that lived this long starts anew after the first pause
START_SECONDS = 600.0  # how long loading and warming a model may take
SILENT_SECONDS = 5.0  # without a beat: not well; that long beyond NERMILL_HANG_SECONDS: killed
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
    """One process of a device, and what is heard of it."""

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
        self.process = subprocess.Popen(
            _command(device),
            env=environment,
            # Logs go to stderr; Celery's farewell, which goes to stdout, is no JSON.
            stdout=subprocess.DEVNULL if settings.log_format == "json" else None,
            preexec_fn=partial(_prepare_child, cores),
            pass_fds=[self.heartbeat.writer],
        )
        self.heartbeat.close_writer()

    @property
    def is_healthy(self) -> bool:
        """Whether it was heard of lately, or may still be loading its model."""
        return not self.is_killed and (not self.heartbeat.received or self.heartbeat.silent_seconds() < SILENT_SECONDS)

    def end_if_silent(self, hang_seconds: float) -> None:
        """Kills a process that hangs so hard that it cannot end itself: its threads stand still, or it never loads."""
        silent = self.heartbeat.silent_seconds()
        limit = hang_seconds + SILENT_SECONDS if self.heartbeat.received else START_SECONDS
        if silent > limit and not self.is_killed:
            self.is_killed = True
            with about(device=self.device.name):
                log.critical("%s: nothing was heard of the worker for %.0f s; it is killed", self.device.name, silent)
            self.process.kill()


class Supervisor:
    """Keeps one Celery process a device alive.

    A process that dies is started again, after a pause that doubles while it keeps dying young; one that falls
    silent is killed first; one that refuses its settings (exit code 2) ends the supervisor. One that was told to shut
    down by Celery's remote control (exit code 0) stays down; the supervisor ends with the last of them.
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
        """Supervises until told to stop."""
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
            if self._stopping:  # told so while the process began
                supervised.process.send_signal(signal.SIGTERM)

    def _has_failed_to_start(self, index: int) -> bool:
        return 0 < self._settings.start_attempts <= self._failed_starts[index]

    def _note_shutdown(self, supervised: Supervised) -> None:
        self._stopped += 1
        with about(device=supervised.device.name):
            log.info("%s: the worker was told to shut down, and stays down", supervised.device.name)

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
        """Ready when every device was heard of once; alive while all that run are well."""
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
    lonely = ["--without-gossip", "--without-mingle"]  # processes need not know each other
    name = f"nermill-{device.kind}{device.number}-{os.getpid()}@%h"
    return python_command(APP, *celery, *lonely, "-n", name)


def cores_of(devices: Sequence[Device]) -> list[frozenset[int]]:
    """The cores that each device's process may use: all, but processes that compute on a CPU share them out.

    Cores of one socket are neighbours in the sharing, so that as many processes as sockets get a socket each.
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


def _prepare_child(cores: frozenset[int]) -> None:
    """In the new process: it keeps to its cores, and follows its supervisor, whatever kills that one."""
    os.sched_setaffinity(0, cores)
    end_with_parent()
