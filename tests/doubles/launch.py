"""``nermill-worker`` with the double: ``python -m tests.doubles.launch`` starts ``tests.doubles.app`` a device."""

from __future__ import annotations

import os
from pathlib import Path

from nermill.worker.process import launch, supervisor

# Worker processes have no working directory on their import path.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
supervisor.APP = "tests.doubles.app"

if __name__ == "__main__":
    launch.main()
