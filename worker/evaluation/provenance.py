"""What a report says about the origin of its values: input, model, options, machines, versions."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nermill.worker.contracts.errors import ArtifactError
from nermill.worker.contracts.manifest import Manifest, load_manifest, resolve_artifact
from nermill.worker.contracts.plan import Plan
from nermill.worker.evaluation.blocks import Part

_LIBRARIES = ("nermill", "numpy", "pyarrow")


def find_manifest(plan: Plan, parts: list[Part]) -> Manifest | None:
    """The manifest of the artifact that wrote the parts; None where this machine does not have that artifact."""
    try:
        manifest = load_manifest(resolve_artifact(plan.model.get("name") or "demo"))
    except ArtifactError:
        return None
    return manifest if {part.metadata.get("artifact_sha256") for part in parts} == {manifest.sha256} else None


def describe_origin(plan: Plan, parts: list[Part], manifest: Manifest | None) -> dict[str, Any]:
    """The report's object ``origin``.

    Args:
        plan: The run's plan.
        parts: The parts that were read.
        manifest: The artifact's manifest, where it was found.
    """
    stats = [entry for part in parts for entry in part.stats]
    return {
        "created": plan.created,
        "inputs": [asdict(entry) for entry in plan.inputs],
        "options": {**asdict(plan.options), "only": list(plan.options.only)},
        "model": _values(parts, "model"),
        "artifact_sha256": _values(parts, "artifact_sha256"),
        "aggregation": _values(parts, "aggregation"),
        "artifact": None if manifest is None else _public_fields(manifest),
        "hosts": sorted({str(entry["host"]) for entry in stats if "host" in entry}),
        "devices": sorted({str(entry["device"]) for entry in stats if "device" in entry}),
        "evaluated_with": {
            "python": platform.python_version(),
            **{name: found for name in _LIBRARIES if (found := _version(name))},
        },
    }


def _public_fields(manifest: Manifest) -> dict[str, Any]:
    hidden = {"files", "inputs", "cls_id", "sep_id", "pad_id", "position_offset"}
    return {name: value for name, value in asdict(manifest).items() if name not in hidden}


def _values(parts: list[Part], key: str) -> list[str]:
    return sorted({part.metadata.get(key, "") for part in parts})


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
