"""Evaluates one run and writes its report, as a part of its last step: ``python -m nermill.worker.evaluation RUN PID``.

PID is that of the worker which starts it, and with which it ends.
"""

from __future__ import annotations

import sys

from nermill.worker.contracts.command import end_with
from nermill.worker.contracts.errors import NermillError
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.evaluation import evaluate, write_report
from nermill.worker.process import logs


def main(uri: str) -> None:
    """Writes the report of a run.

    Args:
        uri: The run's folder.
    """
    run = RunFolder(uri)
    try:
        write_report(run, evaluate(run))
    except NermillError as error:
        logs.report_error(error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    end_with(int(sys.argv[2]))
    main(sys.argv[1])
