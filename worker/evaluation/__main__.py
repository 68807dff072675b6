"""Evaluates one run and writes its report: ``python -m nermill.worker.evaluation RUN``, a run's last step."""

from __future__ import annotations

import sys

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
    main(sys.argv[1])
