"""Where CANN, Huawei's toolkit for Ascend NPUs, is on this machine: its compiler ``atc`` and its environment."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

SET_ENV = "/usr/local/Ascend/ascend-toolkit/set_env.sh"
_HOMES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")


def toolkits() -> list[Path]:
    """Folders of the toolkits whose environment is loaded."""
    return [Path(home) for name in _HOMES if (home := os.environ.get(name))]


def is_loaded() -> bool:
    """Whether CANN's environment is loaded, which its compiler and its runtime need."""
    return bool(toolkits()) or "ASCEND_OPP_PATH" in os.environ


def atc() -> str | None:
    """The compiler's path, from PATH or from a toolkit's folder; None where there is none."""
    places = [home / place / "atc" for home in toolkits() for place in ("bin", "compiler/bin")]
    return shutil.which("atc") or next((str(path) for path in places if os.access(path, os.X_OK)), None)
