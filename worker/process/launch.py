"""``nermill-worker``: starts and supervises one Celery process for each device.

A process gets the environment variable that limits it to its device before it imports an accelerator's library.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nermill.worker.contracts.broker import check_url
from nermill.worker.contracts.command import python_command
from nermill.worker.contracts.device import Device, parse_devices
from nermill.worker.contracts.errors import NermillError
from nermill.worker.contracts.manifest import Manifest, load_manifest, resolve_artifact
from nermill.worker.process import logs
from nermill.worker.process.settings import Settings, read_settings
from nermill.worker.process.supervisor import Supervisor, environment_of

# Options that are passed to the processes as NERMILL_* environment variables.
SETTINGS = (
    "broker_url",
    "model",
    "lease_seconds",
    "allowed_roots",
    "metrics_port",
    "concurrency",
    "threads",
    "log_format",
)


def visible_devices(manifest: Manifest) -> list[Device]:
    """The devices of this machine that the artifact's backend can use, for ``--devices auto``.

    They are found by their files in /dev and /proc; no accelerator's library is imported.
    """
    npus = sorted(int(p.name[7:]) for p in Path("/dev").glob("davinci[0-9]*"))
    if manifest.backend in ("aie", "om") and npus:
        return [Device("npu", n) for n in npus]
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*"))
    if manifest.backend == "torch" and cards and manifest.precision != "int8":
        return [Device("cuda", n) for n in range(len(cards))]
    return [Device("cpu")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``nermill-worker``."""
    options = _parser().parse_args(arguments)
    logs.configure(options.log_format or os.environ.get("NERMILL_LOG_FORMAT", "text"))
    try:
        sys.exit(run(options))
    except NermillError as error:
        logs.report_error(error)
        sys.exit(error.exit_code)


def run(options: argparse.Namespace) -> int:
    """Starts and supervises the processes until SIGTERM or SIGINT; returns the exit code.

    Raises:
        UsageError: an option, setting or artifact is invalid.
    """
    for name in SETTINGS:
        if (value := getattr(options, name)) is not None:
            os.environ[f"NERMILL_{name.upper()}"] = str(value)
    if "@" in (options.broker_url or ""):
        _restart_without_flags(options)
    settings = read_settings(os.environ)
    check_url(settings.broker_url)
    artifact = resolve_artifact(settings.model)
    manifest = load_manifest(artifact)
    devices = parse_devices(options.devices) or visible_devices(manifest)
    if options.dry_run:
        return _dry_run(artifact, devices, settings)
    return Supervisor(devices, settings).run()


def _restart_without_flags(options: argparse.Namespace) -> None:
    """Executes this program again without its flags, since every user may read a command line and a password in it."""
    os.environ["NERMILL_DEVICES"] = options.devices  # all other options are in the environment already
    dry_run = ["--dry-run"] if options.dry_run else []
    os.execv(sys.executable, python_command("nermill.worker.process.launch", *dry_run))


def _dry_run(artifact: Path, devices: list[Device], settings: Settings) -> int:
    """Runs ``worker.process.dry_run`` for each device in turn; returns the first exit code that is not 0."""
    for index, device in enumerate(devices):
        environment = {**os.environ, **environment_of(device, index, settings)}
        code = subprocess.run(
            python_command("nermill.worker.process.dry_run", str(artifact)), env=environment, check=False
        )
        if code.returncode:
            return max(code.returncode, 1)
    return 0


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
    parser.add_argument(
        "--lease-seconds", type=float, help="how long a worker that stopped keeps a shard (default: 60)"
    )
    parser.add_argument(
        "--allowed-roots", help="folders and URIs below which runs may lie, separated by commas (default: this folder)"
    )
    parser.add_argument("--metrics-port", type=int, help="first Prometheus port; device N listens on port + N")
    parser.add_argument("--concurrency", type=int, help="most shards in a process at once (default: 8)")
    parser.add_argument("--threads", type=int, help="compute threads on a CPU (default: one a core)")
    parser.add_argument("--log-format", choices=logs.FORMATS, help="text, or one JSON object a line (default: text)")
    parser.add_argument("--dry-run", action="store_true", help="load, warm every shape, tag one example, exit")
    return parser


if __name__ == "__main__":
    main()
