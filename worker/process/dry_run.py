"""Tags one example on this process's device and prints the result: a device's process of ``--dry-run``."""

from __future__ import annotations

import os
import sys
import time

from nermill.worker.contracts.errors import NermillError
from nermill.worker.process.settings import read_settings
from nermill.worker.tagging.tagger import Tagger

EXAMPLE = "Ada Lovelace wrote the first program in London for Charles Babbage."


def main(artifact: str) -> int:
    """Loads the artifact, runs every compiled shape and tags EXAMPLE; returns the exit code.

    Args:
        artifact: The artifact's folder.
    """
    try:
        settings = read_settings(os.environ)
        begun = time.monotonic()
        with Tagger.load(artifact, device=settings.device, threads=settings.threads) as tagger:
            loaded = time.monotonic()
            (annotation,) = tagger.tag([EXAMPLE])
            tagged = time.monotonic()
    except NermillError as error:
        print(f"nermill-worker: {settings.device_name}: {error}", file=sys.stderr)
        return error.exit_code
    found = ", ".join(f"{e.text} ({e.label} {e.score:.2f})" for e in annotation.entities) or "no entity"
    milliseconds = (tagged - loaded) * 1000
    print(f"{settings.device_name}: ready in {loaded - begun:.1f} s, one example in {milliseconds:.0f} ms: {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
