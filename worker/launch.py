"""``nermill-worker``: one supervised Celery process a device, pinned before anything heavy is imported."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from worker.contracts.broker import check_url
from worker.contracts.errors import NermillError, UsageError
from worker.contracts.manifest import Manifest, load_manifest, resolve_artifact
from worker.settings import Settings, read_settings

log = logging.getLogger("nermill.worker")

PIN_VARIABLES = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
EXIT_SYSTEM = 1
RESTART_SECONDS = (0.5, 30.0)  # first and longest pause before a process that died is started again
STEADY_SECONDS = 60.0  # a process that lived this long starts anew without a pause
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Device:
    """One device as the operator names it: ``cpu``, ``cuda:0``, ``npu:3``."""

    kind: str
    number: int

    @property
    def name(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.number}"

    def environment(self, index: int, settings: Settings) -> dict[str, str]:
        """Variables of the process that owns this device; after pinning it is the process's only one, number 0."""
        variables = {
            "NERMILL_DEVICE": "cpu" if self.kind == "cpu" else f"{self.kind}:0",
            "NERMILL_DEVICE_NAME": self.name,
            "TOKENIZERS_PARALLELISM": "true",
        }
        if self.kind in PIN_VARIABLES:
            variables[PIN_VARIABLES[self.kind]] = str(self.number)
        if settings.metrics_port:
            variables["NERMILL_METRICS_PORT"] = str(settings.metrics_port + index)
        return variables


def parse_devices(text: str, manifest: Manifest) -> list[Device]:
    """Devices from ``auto`` or a list such as ``npu:0,npu:1``.

    Raises:
        UsageError: a device that does not parse, or is named twice.
    """
    if text == "auto":
        return visible_devices(manifest)
    devices: list[Device] = []
    for name in text.split(","):
        kind, colon, number = name.strip().partition(":")
        if kind == "cpu" and not colon:
            devices.append(Device("cpu", len(devices)))
        elif kind in PIN_VARIABLES and number.isdecimal():
            devices.append(Device(kind, int(number)))
        else:
            raise UsageError(f"--devices {text!r}: {name!r} is no device; say auto, cpu, cuda:N or npu:N")
    if len({(d.kind, d.number) for d in devices}) < len(devices):
        raise UsageError(f"--devices {text!r}: a device is named twice")
    return devices


def visible_devices(manifest: Manifest) -> list[Device]:
    """The devices of this machine that the artifact's backend can use, without importing its runtime."""
    npus = sorted(int(p.name[7:]) for p in Path("/dev").glob("davinci[0-9]*"))
    if manifest.backend == "aie" and npus:
        return [Device("npu", n) for n in npus]
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*"))
    if manifest.backend == "torch" and cards and manifest.precision != "int8":
        return [Device("cuda", n) for n in range(len(cards))]
    return [Device("cpu", 0)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``nermill-worker``."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        sys.exit(run(_parser().parse_args(arguments)))
    except NermillError as error:
        print(f"nermill-worker: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def run(options: argparse.Namespace) -> int:
    """Starts and supervises the processes until SIGTERM or SIGINT; returns the exit code.

    Raises:
        UsageError: an option, setting or artifact that does not serve.
    """
    for name in ("broker_url", "model", "lease_seconds", "allowed_roots", "metrics_port", "concurrency", "threads"):
        if (value := getattr(options, name)) is not None:
            os.environ[f"NERMILL_{name.upper()}"] = str(value)
    if "@" in (options.broker_url or ""):
        _leave_the_process_list(options)
    settings = read_settings(os.environ)
    check_url(settings.broker_url)
    artifact = resolve_artifact(settings.model)
    devices = parse_devices(options.devices, load_manifest(artifact))
    if options.dry_run:
        return _dry_run(artifact, devices, settings)
    return Supervisor(devices, settings).run()


def _leave_the_process_list(options: argparse.Namespace) -> None:
    """Everybody may read a command line, a password in it included: goes on as the same process without its flags."""
    os.environ["NERMILL_DEVICES"] = options.devices  # all others are in the environment already
    dry_run = ["--dry-run"] if options.dry_run else []
    os.execv(sys.executable, [sys.executable, "-m", "worker.launch", *dry_run])


def _dry_run(artifact: Path, devices: list[Device], settings: Settings) -> int:
    """Loads, warms every shape and tags one example on each device, in a process of its own."""
    for index, device in enumerate(devices):
        environment = {**os.environ, **device.environment(index, settings)}
        code = subprocess.run([sys.executable, "-m", "worker.dry_run", str(artifact)], env=environment, check=False)
        if code.returncode:
            return code.returncode
    return 0


class Supervisor:
    """Keeps one Celery process a device alive.

    A process that dies is started again, after a pause that doubles while it keeps dying young; one that refuses
    its settings (exit code 2) ends the supervisor.
    """

    def __init__(self, devices: list[Device], settings: Settings) -> None:
        self._devices = devices
        self._settings = settings
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._started: dict[int, float] = {}
        self._pause: dict[int, float] = {}
        self._due: dict[int, float] = dict.fromkeys(range(len(devices)), 0.0)
        self._stopping = False

    def run(self) -> int:
        """Supervises until told to stop."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        code = 0
        while self._processes or not self._stopping:
            self._start_due()
            time.sleep(0.1)
            for index, process in list(self._processes.items()):
                status = process.poll()
                if status is None:
                    continue
                del self._processes[index]
                if not self._stopping:
                    if status == UsageError.exit_code:
                        code = status
                        self._stop()
                    else:
                        self._plan_restart(index, status)
        return code

    def _start_due(self) -> None:
        for index, due in list(self._due.items()):
            if self._stopping or time.monotonic() < due:
                continue
            del self._due[index]
            device = self._devices[index]
            environment = {**os.environ, **device.environment(index, self._settings)}
            self._processes[index] = subprocess.Popen(_command(device), env=environment, preexec_fn=_die_with_parent)
            self._started[index] = time.monotonic()

    def _plan_restart(self, index: int, status: int) -> None:
        lived = time.monotonic() - self._started[index]
        shortest, longest = RESTART_SECONDS
        pause = shortest if lived > STEADY_SECONDS else self._pause.get(index, shortest)
        self._pause[index] = min(longest, pause * 2)
        self._due[index] = time.monotonic() + pause
        log.error("%s: the worker ended with %d; starting it again in %.1f s", self._devices[index].name, status, pause)

    def _stop(self, *_: object) -> None:
        self._stopping = True
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)


def _command(device: Device) -> list[str]:
    celery = ["celery", "--quiet", "-A", "worker.app", "worker", "--pool", "threads", "--loglevel", "INFO"]
    lonely = ["--without-gossip", "--without-mingle", "--without-heartbeat"]  # processes need not know each other
    return [sys.executable, "-m", *celery, *lonely, "-n", f"nermill-{device.kind}{device.number}-{os.getpid()}@%h"]


def _die_with_parent() -> None:
    """The process follows its supervisor, whatever kills that one."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nermill-worker",
        description="Tags shards from the queue: one supervised Celery process per device.",
        epilog="example: nermill-worker --model bert-large-ner.npu --devices npu:0,npu:1 --broker redis://queue:6379/0",
    )
    parser.add_argument("--model", help="demo, or an artifact's folder (NERMILL_MODEL; default: demo)")
    parser.add_argument(
        "--devices",
        default=os.environ.get("NERMILL_DEVICES", "auto"),
        help="auto, or a list such as cpu | cuda:0,cuda:1 | npu:0 (NERMILL_DEVICES; default: auto)",
    )
    parser.add_argument("--broker", dest="broker_url", help="broker URL (NERMILL_BROKER_URL)")
    parser.add_argument("--lease-seconds", type=float, help="how long a silent worker keeps a shard (default: 60)")
    parser.add_argument("--allowed-roots", help="folders and URIs below which runs may lie (default: this folder)")
    parser.add_argument("--metrics-port", type=int, help="first Prometheus port; device N listens on port + N")
    parser.add_argument("--concurrency", type=int, help="shards in a process at once (default: 8)")
    parser.add_argument("--threads", type=int, help="compute threads on a CPU (default: all cores)")
    parser.add_argument("--dry-run", action="store_true", help="load, warm every shape, tag one example, exit")
    return parser


if __name__ == "__main__":
    main()
