"""A machine with CANN for tests: ``atc`` on the PATH, its environment, and the wheels ais_bench and aclruntime."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WHEELS = Path(__file__).parent / "ascend"


def environment(folder: Path, *, version: str = "8.0.RC1", socs: tuple[str, ...] = ("Ascend310P3",)) -> dict[str, str]:
    """Environment variables of a process on such a machine; its toolkit is written into ``folder``."""
    home = folder / "ascend-toolkit"
    machine = home / f"{platform.machine()}-linux"
    config = machine / "data" / "platform_config"
    config.mkdir(parents=True)
    for soc in socs:
        (config / f"{soc}.ini").touch()
    info = f"package_name=Ascend-cann-toolkit\nversion={version}\narch={platform.machine()}\n"
    (machine / "ascend_toolkit_install.info").write_text(info, "utf-8")
    (home / "bin").mkdir()
    atc = home / "bin" / "atc"
    path = os.pathsep.join([str(ROOT / ".src"), str(ROOT)])
    atc.write_text(f'#!/bin/bash\nPYTHONPATH="{path}" exec "{sys.executable}" -m tests.doubles.atc "$@"\n', "utf-8")
    atc.chmod(0o755)
    return {
        "PATH": os.pathsep.join([str(home / "bin"), os.environ["PATH"]]),
        "ASCEND_TOOLKIT_HOME": str(home),
        "PYTHONPATH": os.pathsep.join([str(WHEELS), path]),
    }


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, **options: Any) -> dict[str, str]:
    """Makes this process one on such a machine."""
    variables = environment(folder, **options)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    wheels(monkeypatch)
    return variables


def wheels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets this process import the two wheels, fresh; returns the module of ``InferSession``."""
    forget(monkeypatch)
    monkeypatch.syspath_prepend(str(WHEELS))
    from ais_bench.infer import interface

    interface.reset()
    return interface


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two wheels are imported anew, where they are there at all."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ais_bench", "aclruntime")]:
        monkeypatch.delitem(sys.modules, name)
