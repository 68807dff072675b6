"""``nermill-worker``: starts and supervises one Celery process for each device.

A process gets the environment variable that limits it to its device before it imports an accelerator's library.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from nermill.worker.contracts.broker import check_url
from nermill.worker.contracts.command import python_command
from nermill.worker.contracts.console import exit_code
from nermill.worker.contracts.device import Device, parse_devices
from nermill.worker.contracts.errors import NermillError
from nermill.worker.contracts.manifest import Manifest, load_manifest, resolve_artifact
from nermill.worker.process import logs
from nermill.worker.process.settings import Settings, read_settings
from nermill.worker.process.supervisor import Supervisor, environment_of

# Settings that have an option, in the order of ``launch``.
SETTINGS = (
    "model", "broker_url", "lease_seconds", "allowed_roots", "metrics_port", "concurrency", "threads", "log_format",
)  # fmt: skip


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


def launch(
    model: Annotated[
        str | None, typer.Option("--model", metavar="ART", help="demo, or an artifact's folder; default: demo.")
    ] = None,
    devices: Annotated[
        str,
        typer.Option(
            "--devices",
            metavar="LIST",
            envvar="NERMILL_DEVICES",
            help="auto, or a list: cpu | cuda:0,cuda:1 | npu:0,npu:1.",
        ),
    ] = "auto",
    broker: Annotated[str | None, typer.Option("--broker", metavar="URL", help="Broker URL.")] = None,
    lease_seconds: Annotated[
        float | None,
        typer.Option("--lease-seconds", help="How long a worker that stopped keeps a shard; default: 60."),
    ] = None,
    allowed_roots: Annotated[
        str | None,
        typer.Option(
            "--allowed-roots",
            metavar="LIST",
            help="Folders and URIs below which runs may lie, separated by commas; default: this folder.",
        ),
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option("--metrics-port", help="First Prometheus port; device N listens on port + N.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", help="Most shards in a process at once; default: 16.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Compute threads on a CPU; default: one a core.")
    ] = None,
    log_format: Annotated[
        str | None,
        typer.Option("--log-format", metavar="FORMAT", help="text, or json: one object a line; default: text."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load, warm every shape, tag one example, exit.")] = False,
) -> int:
    """Tag shards from the queue: one supervised Celery process for each device.

    Every option but --dry-run can be set by an environment variable too: NERMILL_MODEL, NERMILL_BROKER_URL and so on.
    """
    flags = (model, broker, lease_seconds, allowed_roots, metrics_port, concurrency, threads, log_format)
    os.environ.update(
        {f"NERMILL_{name.upper()}": str(flag) for name, flag in zip(SETTINGS, flags, strict=True) if flag is not None}
    )
    logs.configure(os.environ.get("NERMILL_LOG_FORMAT", "text"))
    try:
        if "@" in (broker or ""):
            _restart_without_flags(devices, dry_run)
        return run(devices, dry_run)
    except NermillError as error:
        logs.report_error(error)
        return error.exit_code


def run(names: str, dry_run: bool) -> int:
    """Starts and supervises the processes until SIGTERM or SIGINT, as the environment says; returns the exit code.

    Args:
        names: Value of ``--devices``.
        dry_run: Whether each device tags one example instead.

    Raises:
        UsageError: an option, setting or artifact is invalid.
    """
    settings = read_settings(os.environ)
    check_url(settings.broker_url)
    artifact = resolve_artifact(settings.model)
    manifest = load_manifest(artifact)
    devices = parse_devices(names) or visible_devices(manifest)
    if dry_run:
        return _dry_run(artifact, devices, settings)
    return Supervisor(devices, settings).run()


def _restart_without_flags(devices: str, dry_run: bool) -> None:
    """Executes this program again without its flags, since every user may read a command line and a password in it."""
    os.environ["NERMILL_DEVICES"] = devices  # all other options are in the environment already
    os.execv(sys.executable, python_command("nermill.worker.process.launch", *(["--dry-run"] if dry_run else [])))


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


app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(
    epilog="Example: nermill-worker --model bert-large-ner.npu --devices npu:0,npu:1 --broker redis://queue:6379/0"
)(launch)


def main() -> None:
    """Entry point of ``nermill-worker``."""
    sys.exit(exit_code("nermill-worker", partial(app, standalone_mode=False, prog_name="nermill-worker"), typer.Abort))


if __name__ == "__main__":
    main()
