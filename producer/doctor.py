"""``nermill doctor``: checks broker, workers, model, devices and write access, and says how to correct what fails."""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec

from nermill.producer.runs.planning import check_writable, normalised
from nermill.producer.runs.queue import Queue
from nermill.producer.sources.files import is_remote
from nermill.worker.contracts import cann
from nermill.worker.contracts.broker import redacted
from nermill.worker.contracts.device import find_device
from nermill.worker.contracts.errors import BrokerError, NermillError
from nermill.worker.contracts.labels import bare_labels
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.manifest import Manifest, load_manifest, resolve_artifact
from nermill.worker.contracts.processor import has_bf16, has_int8_products, processor_name, usable_cores

_RUNTIMES = {
    "onnx": ("onnxruntime", "worker"),
    "torch": ("torch", "torch"),
    "openvino": ("openvino", "openvino"),
    "aie": ("mindietorch", ""),
    "om": ("ais_bench", ""),
}
_WHEELS = {
    "aie": "the mindietorch wheel of your MindIE release",
    "om": "the wheels ais_bench and aclruntime of Ascend's tools, for this Python",
}
_DEVICE_FILES = {"cuda": "/dev/nvidia{}", "npu": "/dev/davinci{}"}


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: What was checked, such as ``broker``.
        ok: Whether it works.
        detail: What was found.
        fix: What to do where it does not work, else empty.
    """

    name: str
    ok: bool
    detail: str
    fix: str = ""


def examine(broker: str, model: str, devices: str, out: str | None) -> Iterator[Finding]:
    """Runs all checks; a check that fails is a finding, not an error.

    Args:
        broker: Broker URL.
        model: Artifact, by name or path.
        devices: Value of ``--devices``.
        out: Folder or URI to be written; None for the working directory.
    """
    queue, finding = _broker(broker)
    yield finding
    yield _embedded_server()
    manifest, finding = _model(model)
    yield finding
    if queue is not None:
        yield _workers(queue, manifest, model)
        yield from _first_version(queue)
    if manifest is not None:
        yield _runtime(manifest)
        if manifest.backend == "om":
            yield _compiler()
    if devices == "auto" and manifest is not None and manifest.backend in _WHEELS:
        devices = "npu:0"  # the backend runs on NPUs only
    for device in devices.split(","):
        yield _device(device.strip())
    yield _output(out or ".")


def _broker(url: str) -> tuple[Queue | None, Finding]:
    try:
        queue = Queue(url)
        policy = queue.setting("maxmemory-policy")
    except BrokerError as error:
        return None, Finding("broker", False, str(error).partition(";")[0], _broker_remedy(str(error)))
    except NermillError as error:
        return None, Finding(
            "broker", False, str(error), "name a redis://, rediss://, redis+socket:// or sentinel:// URL"
        )
    if policy not in ("noeviction", None):
        remedy = "redis-cli config set maxmemory-policy noeviction"
        detail = f"{redacted(url)} may evict the queue (maxmemory-policy {policy})"
        return queue, Finding("broker", False, detail, remedy)
    return queue, Finding("broker", True, f"{redacted(url)} answers")


def _broker_remedy(message: str) -> str:
    lowered = message.lower()
    if any(word in lowered for word in ("auth", "password", "wrongpass")):
        return "put the right password into NERMILL_BROKER_URL: redis://:PASSWORD@HOST:6379/0"
    if "too old" in lowered:
        return "upgrade the server: Redis 6.2 or newer, or Valkey"
    if "cluster" in lowered:
        return "point NERMILL_BROKER_URL at a Redis or Valkey without cluster mode (cluster-enabled no), or at Sentinel"
    return "valkey-server --maxmemory-policy noeviction, or point NERMILL_BROKER_URL at the one that runs"


def _embedded_server() -> Finding:
    from nermill.producer.local.broker import find_server_binary

    try:
        return Finding("embedded", True, f"nermill run starts {find_server_binary().name} for itself")
    except NermillError as error:
        return Finding("embedded", False, str(error).partition(";")[0], "pip install 'nermill[embedded]'")


def _model(model: str) -> tuple[Manifest | None, Finding]:
    try:
        manifest = load_manifest(resolve_artifact(model))
    except NermillError as error:
        what, _, remedy = str(error).partition("; ")
        return None, Finding("model", False, what, remedy or "nermill-build compile CHECKPOINT --out ART")
    labels = ", ".join(bare_labels(manifest.labels))
    detail = f"{model}: {manifest.backend}, {manifest.precision}, {labels}; every file's hash is right"
    return manifest, Finding("model", True, detail)


def _workers(queue: Queue, manifest: Manifest | None, model: str) -> Finding:
    start = f"nermill-worker --model {model} --broker {redacted(queue.url)}"
    try:
        workers = queue.workers()
        wanted = queue.waiting_artifacts()
    except NermillError as error:
        return Finding("workers", False, str(error), _broker_remedy(str(error)))
    if not workers:
        return Finding("workers", False, "no worker listens at this broker", start)
    served = {worker.artifact[:12]: f"{worker.model} ({worker.artifact[:12]})" for worker in workers}
    found = f"{len(workers):,} on {', '.join(sorted({worker.device for worker in workers}))}"
    found = f"{found}: {', '.join(sorted(served.values()))}"
    if manifest is not None and manifest.sha256[:12] not in served:
        detail = f"none serves {model} ({manifest.sha256[:12]}); {found}"
        return Finding("workers", False, detail, f"{start}; or name with --model the artifact that they serve")
    if unserved := wanted - served.keys():
        names = ", ".join(sorted(unserved))
        detail = f"runs wait for another artifact (sha256 {names}) than the workers serve; {found}"
        return Finding("workers", False, detail, "nermill-worker --model THAT_ARTIFACT")
    own = "" if manifest is None else manifest.sha256[:12]
    if others := sorted(served[sha] for sha in wanted & served.keys() if sha != own):
        found = f"{found}; runs wait for {', '.join(others)}"
    return Finding("workers", True, found)


def _first_version(queue: Queue) -> Iterator[Finding]:
    with suppress(NermillError):  # the findings above report it
        what, _, remedy = queue.first_version().partition("; ")
        if what:
            yield Finding("version", False, what, remedy)


def _runtime(manifest: Manifest) -> Finding:
    module, extra = _RUNTIMES[manifest.backend]
    if module == "ais_bench" and find_spec(module) is not None and find_spec("aclruntime") is None:
        remedy = f"install the aclruntime wheel for Python {platform.python_version()}, or use the wheel's Python"
        return Finding("runtime", False, "ais_bench is installed and aclruntime, which it needs, is not", remedy)
    if find_spec(module) is not None:
        detail = f"{module} is installed for backend {manifest.backend}"
        if manifest.backend != "openvino":
            return Finding("runtime", True, detail)
        if manifest.precision == "bf16" and not has_bf16():
            remedy = "nermill-build compile CHECKPOINT --backend openvino --precision int8 --out ART"
            return Finding("runtime", False, f"{detail}, and this CPU ({processor_name()}) computes no bf16", remedy)
        slow = manifest.precision == "int8" and not has_int8_products()
        return Finding("runtime", True, detail + "; this CPU has no VNNI: let bench compare it with onnx" * slow)
    remedy = f"pip install 'nermill[{extra}]'" if extra else f"install {_WHEELS[manifest.backend]}"
    return Finding("runtime", False, f"{module} is not installed, backend {manifest.backend} needs it here", remedy)


def _compiler() -> Finding:
    """Where CANN's compiler atc is; it is needed to build artifacts, not to run them."""
    atc = cann.atc()
    if atc is None:
        return Finding("atc", True, "not here; only building with om needs it")
    rest = "" if cann.is_loaded() else f" once CANN's environment is loaded: source {cann.SET_ENV}"
    return Finding("atc", True, f"{atc} builds for backend om{rest}")


def _device(name: str) -> Finding:
    device = find_device(name)
    if name == "auto" or (device and device.kind == "cpu"):
        return Finding("device", True, f"{name}: {usable_cores()} cores")
    if device is None:
        return Finding("device", False, f"{name!r} is no device", "say auto, cpu, cuda:N or npu:N")
    path = _DEVICE_FILES[device.kind].format(device.number)
    if not os.path.exists(path):
        remedy = (
            "npu-smi info; start the container with --device "
            if device.kind == "npu"
            else "nvidia-smi; give the container the GPU: "
        )
        return Finding("device", False, f"{name} is not visible ({path} is missing)", remedy + path)
    if not os.access(path, os.R_OK | os.W_OK):
        return Finding("device", False, f"{name}: no access to {path}", f"add this user to the group that owns {path}")
    return Finding("device", True, f"{name} is visible")


def _output(out: str) -> Finding:
    probe = f".nermill-{uuid.uuid4().hex}"
    try:
        root = normalised(out)
        folder = RunFolder(root if is_remote(root) else check_writable(root))
        folder.write(probe, b"")
        folder.remove(probe)
    except NermillError as error:
        detail = str(error).partition(";")[0].replace(f"/{probe}", "")
        return Finding("output", False, detail, "name a folder or URI that you may write with --out")
    return Finding("output", True, f"{root} can be written")
