"""``nermill-worker`` around the double: ``python -m tests.doubles.launch`` starts ``tests.doubles.app`` a device."""

from __future__ import annotations

from worker import launch, supervisor

supervisor.APP = "tests.doubles.app"

if __name__ == "__main__":
    launch.main()
