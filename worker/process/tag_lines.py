"""The child process of ``nermill tag``: reads texts as JSON, one a line, and writes one annotation a line as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from importlib.abc import MetaPathFinder

from nermill.worker.contracts.errors import NermillError
from nermill.worker.tagging.tagger import Tagger


class _WithoutPandas(MetaPathFinder):
    """Makes ``import pandas`` fail: pyarrow imports it where it is installed, which takes half a second."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError(fullname)


def main(model: str, device: str) -> int:
    """Loads the model, then reads and tags standard input; returns the exit code.

    Args:
        model: Artifact, by name or path.
        device: ``cpu``, ``cuda:N`` or ``npu:N``.
    """
    sys.meta_path.insert(0, _WithoutPandas())
    try:
        with Tagger.load(model, device=device) as tagger:
            texts = [json.loads(line) for line in sys.stdin.buffer]
            for annotation in tagger.tag(texts) if texts else ():
                sys.stdout.write(json.dumps(asdict(annotation)) + "\n")
    except NermillError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
