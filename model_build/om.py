"""Offline models for Ascend NPUs through CANN's compiler ``atc``: documented options alone, untried on hardware.

Sources: CANN's documentation of ATC (6.0.1 to 8.1.RC1) and the BERT recipes of Ascend/ModelZoo-PyTorch.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from nermill.model_build.export import TRACED_OPSET
from nermill.worker.contracts import cann
from nermill.worker.contracts.cann import SET_ENV
from nermill.worker.contracts.errors import ArtifactError, EngineError, UsageError
from nermill.worker.contracts.manifest import Manifest, file_sha256
from nermill.worker.engine.golden import golden_difference, load_golden
from nermill.worker.engine.om import OmEngine

GRAPH_FILE = "model.onnx"
MODEL_FILE = "model.om"
SCRIPT_FILE = "convert.sh"
LOG_FILE = "atc.log"
RECEIPT = ".sha256"  # ending of the file beside a converted model that names its graph by hash
MAGIC = b"IMOD"  # an offline model's first bytes: MODEL_FILE_MAGIC_NUM of CANN's graph engine
MAX_GEARS = 100
OLD_CANN = 6  # its pages allow four dynamic dimensions a gear
OLD_CANN_DIMENSIONS = 4
_SOC = re.compile(r"Ascend\d{3}[0-9A-Za-z_]*")
_WORK = "atc"  # folder in which atc runs: it leaves files of its own where it is started

Shapes = tuple[tuple[int, int], ...]


def default_shapes(max_length: int) -> Shapes:
    """Sixteen rows of three lengths: near the best of the published 310P3 table, and one dynamic dimension an input."""
    return tuple((16, length) for length in (64, 128, 512) if length <= max_length) or ((16, max_length),)


def check_order(shapes: Shapes, soc: str) -> None:
    """Refuses what ``atc`` would refuse, before anything is read.

    Raises:
        UsageError: too many gears, more dynamic dimensions than this CANN takes, or a name that is no Ascend chip.
    """
    if len(shapes) > MAX_GEARS:
        raise UsageError(
            f"--shapes: {len(shapes)} shapes; atc takes at most {MAX_GEARS} gears (3 or 4 are recommended)"
        )
    if not _SOC.fullmatch(soc):
        raise UsageError(
            f"--soc {soc}: write the chip with Ascend before the name that npu-smi info shows: Ascend310P3"
        )
    if (known := _known_socs()) and soc not in known:
        listed = shorten(", ".join(known), 120, placeholder=" ...")
        raise UsageError(f"--soc {soc}: this CANN does not know it; it knows {listed}")
    version = cann_version()
    major = re.match(r"\d+", version)
    if major and int(major[0]) <= OLD_CANN and (note := dimensions_note(shapes)):
        raise UsageError(f"--shapes: {note}; here is CANN {version}")


def dimensions_note(shapes: Shapes) -> str:
    """What older CANN refuses of these shapes, and what to write instead; empty where there is nothing."""
    dimensions = 3 * sum(len(set(sizes)) > 1 for sizes in zip(*shapes, strict=True))
    if dimensions <= OLD_CANN_DIMENSIONS:
        return ""
    fixed = ",".join(f"{max(rows for rows, _ in shapes)}x{length}" for length in sorted({n for _, n in shapes}))
    return (
        f"rows and length of three inputs are {dimensions} dynamic dimensions, and CANN {OLD_CANN} takes "
        f"{OLD_CANN_DIMENSIONS}: with the same rows everywhere there are three (--shapes {fixed})"
    )


def arguments(inputs: Sequence[str], shapes: Shapes, soc: str, activation: str) -> list[str]:
    """The arguments of ``atc``, run in a folder beside the graph; one shape is static, several are gears.

    Args:
        inputs: Names of the graph's inputs, in its order; each of shape (rows, length).
        shapes: The (rows, length) pairs.
        soc: Name of the chip.
        activation: The encoder's; the recipe asks for the fast form of Gelu.
    """
    varying = [len(set(sizes)) > 1 for sizes in zip(*shapes, strict=True)]
    sizes = ",".join("-1" if varies else str(size) for varies, size in zip(varying, shapes[0], strict=True))
    made = [
        f"--model=../{GRAPH_FILE}",
        "--framework=5",
        "--output=model",
        "--input_format=ND",
        f"--soc_version={soc}",
        "--input_shape=" + ";".join(f"{name}:{sizes}" for name in inputs),
        "--precision_mode=force_fp16",
        "--log=error",
    ]
    if len(shapes) > 1:
        gears = [[size for varies, size in zip(varying, shape, strict=True) if varies] for shape in shapes]
        made.append("--dynamic_dims=" + ";".join(",".join(map(str, gear * len(inputs))) for gear in gears))
    if activation == "gelu":
        made += ["--optypelist_for_implmode=Gelu", "--op_select_implmode=high_performance"]
    return made


def find_atc() -> str:
    """The compiler's path, from PATH or ASCEND_TOOLKIT_HOME.

    Raises:
        UsageError: there is none, or CANN's environment is not loaded.
    """
    found = cann.atc()
    if found is None:
        raise UsageError(
            f"--backend om needs atc, which comes with CANN and is not on the PATH; source {SET_ENV}, or write the "
            "graph and its command for a machine with CANN: --no-atc"
        )
    if not cann.is_loaded():
        raise UsageError(
            f"{found}: CANN's environment is not loaded (ASCEND_TOOLKIT_HOME is not set); source {SET_ENV}"
        )
    return found


def cann_version() -> str:
    """Version of the CANN toolkit whose environment is loaded, or ``unknown``."""
    for home in cann.toolkits():
        info = home / f"{platform.machine()}-linux" / "ascend_toolkit_install.info"
        try:
            if match := re.search(r"^version=(\S+)", info.read_text("utf-8"), re.MULTILINE):
                return match[1]
        except OSError:
            continue
    return "unknown"


def convert(folder: Path, options: Sequence[str], log_on_failure: Path) -> dict[str, Any]:
    """Compiles ``folder/model.onnx`` into ``folder/model.om``; what atc wrote lies in ``folder/atc.log``.

    Args:
        folder: Where the graph lies.
        options: Of ``arguments``.
        log_on_failure: Where the log goes if there is no model.

    Returns:
        ``seconds``, ``log``: atc's last line.

    Raises:
        UsageError: atc does not start.
        EngineError: atc failed, in its own words.
    """
    work = folder / _WORK
    work.mkdir()
    begun = time.monotonic()
    try:
        with (folder / LOG_FILE).open("wb") as log:
            atc = find_atc()
            code = subprocess.run(
                [atc, *options], cwd=work, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
            ).returncode
    except OSError as error:
        raise UsageError(f"{atc}: does not start ({error.strerror})") from None
    made = sorted(work.glob("model*.om"))  # a model with gears may be called model_linux_x86_64.om
    told = (folder / LOG_FILE).read_text("utf-8", "replace")
    if code or len(made) != 1:
        shutil.copyfile(folder / LOG_FILE, log_on_failure)
        raise EngineError(f"atc failed (exit code {code}): {_reason(told)}; its log is {log_on_failure}")
    os.replace(made[0], folder / MODEL_FILE)
    shutil.rmtree(work)
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return {"seconds": round(time.monotonic() - begun, 1), "log": lines[-1] if lines else ""}


def write_script(folder: Path, options: Sequence[str]) -> None:
    """Writes ``convert.sh``: the same command for a machine with CANN, and the receipt that ``adopt`` asks for."""
    graph = file_sha256(folder / GRAPH_FILE)
    script = folder / SCRIPT_FILE
    script.write_text(
        f"""#!/bin/bash
# Converts {GRAPH_FILE} to {MODEL_FILE} on a machine with CANN. Then: nermill-build adopt ARTIFACT {MODEL_FILE}
set -euo pipefail
cd "$(dirname "$0")"
echo "{graph}  {GRAPH_FILE}" | sha256sum --check --quiet
if ! command -v atc > /dev/null; then
    set +u
    source {SET_ENV}
    set -u
fi
rm -rf {_WORK} && mkdir {_WORK} && cd {_WORK}
atc {shlex.join(options)} 2>&1 | tee ../{LOG_FILE}
mv model*.om ../{MODEL_FILE} && cd .. && rm -r {_WORK}
sha256sum {GRAPH_FILE} {MODEL_FILE} > {MODEL_FILE}{RECEIPT}
""",
        "utf-8",
    )
    script.chmod(0o755)


def finish(folder: Path, manifest: Manifest, out: Path, *, soc: str, has_atc: bool) -> Manifest:
    """Makes of ``folder/model.onnx`` the offline model, or the script that makes it elsewhere.

    Returns:
        The manifest with its model file and, in ``details``, ``soc``, ``cann`` (version), ``gears``, ``command``,
        ``graph_sha256``, ``notes``, ``tried`` (whether the model ran here), ``pending`` (where it waits for ``adopt``).

    Raises:
        UsageError: atc does not start.
        EngineError: atc failed, or its model does not give the golden answers.
    """
    options = arguments(
        [entry.name for entry in manifest.inputs], manifest.shapes, soc, manifest.details["architecture"]["activation"]
    )
    details = {
        **manifest.details,
        "soc": soc,
        "command": shlex.join(["atc", *options]),
        "gears": [list(shape) for shape in manifest.shapes] if len(manifest.shapes) > 1 else [],
        "graph_sha256": file_sha256(folder / GRAPH_FILE),
        "opset": TRACED_OPSET,
    }
    if not has_atc:
        write_script(folder, options)
        details |= {"pending": True, "notes": notes(manifest, "")}
        return replace(manifest, model_file=GRAPH_FILE, details=details)
    atc = convert(folder, options, out.with_name(f"{out.name}.{LOG_FILE}"))
    for name in (GRAPH_FILE, f"{GRAPH_FILE}.data"):
        (folder / name).unlink(missing_ok=True)
    ready = replace(manifest, model_file=MODEL_FILE, details={**details, "cann": cann_version(), "atc": atc})
    difference, reason = try_model(folder, ready, "npu:0")
    if difference is not None and not difference <= manifest.tolerance:
        raise EngineError(
            f"{manifest.name}: the offline model is {difference:.3g} away from the checkpoint's logits "
            f"(tolerance {manifest.tolerance:.3g}); nothing was written"
        )
    tried = {"tried": difference is not None, "notes": notes(manifest, reason)}
    return replace(ready, details={**ready.details, **tried})


def try_model(folder: Path, manifest: Manifest, device: str) -> tuple[float | None, str]:
    """Distance of the offline model from the golden answers, or None and why it does not load here.

    Raises:
        EngineError: it loads, and does not run.
    """
    try:
        engine = OmEngine(folder, manifest, device)
    except ArtifactError as error:
        return None, str(error).removeprefix(f"{folder}: ")
    try:
        return golden_difference(engine, load_golden(folder)), ""
    finally:
        engine.close()


def notes(manifest: Manifest, reason: str) -> list[str]:
    """What to tell whoever built it: what older CANN refuses, and that the model did not run here."""
    untried = f"{MODEL_FILE} did not run here ({reason}); where an NPU is: nermill-build verify ART --device npu:0"
    return [*filter(None, [dimensions_note(manifest.shapes)]), *([untried] if reason else [])]


def _reason(log: str) -> str:
    """The line in which atc says what is wrong: ``E10001: …`` on its console, else the last error, else the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for pattern in (r"\[?E[A-Z0-9]\d{4}\]?\b", r".*\bERROR\b", r".*\berror\b"):
        if said := next((line for line in lines if re.match(pattern, line)), None):
            return shorten(said, 200, placeholder=" ...")
    return shorten(lines[-1], 200, placeholder=" ...") if lines else "it said nothing"


def _known_socs() -> list[str]:
    """Chips that the loaded CANN has a configuration of; empty where it is not found."""
    for home in cann.toolkits():
        machine = home / f"{platform.machine()}-linux"
        if found := sorted(path.stem for path in machine.glob("data/platform_config/Ascend*.ini")):
            return found
    return []
