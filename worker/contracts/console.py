"""How every command ends: a documented exit code, and for a user's mistake one line on standard error."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable

from nermill.worker.contracts.errors import NermillError, UsageError

INTERRUPTED = 3  # not complete, can be resumed
_SHELL_INTERRUPTED = 130  # exit code of the parser after Ctrl-C
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")


def exit_code(program: str, command: Callable[[], int | None], aborted: type[Exception]) -> int:
    """Runs a command line, prints its error if it has one, and returns its exit code.

    Args:
        program: The program's name, printed before each message.
        command: Parses the command line and runs it; returns an exit code, or None for 0.
        aborted: Exception that the parser raises after Ctrl-C.

    Raises:
        Exception: an error that is a defect of nermill; it is shown with its traceback.
    """
    try:
        code = command() or 0
        sys.stdout.flush()  # a closed pipe raises here, not when the interpreter ends
    except NermillError as error:
        return _fail(program, str(error), error.exit_code)
    except (BrokenPipeError, SystemExit) as error:  # the parser and rich turn the first into the second
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # where buffered output goes when the interpreter ends
        return 0
    except (KeyboardInterrupt, aborted):
        return INTERRUPTED
    except Exception as error:
        format_message = getattr(error, "format_message", None)  # an error of click, which typer may bundle
        if format_message is None:
            raise
        message = " ".join(format_message().split())
        message += "" if message.endswith((".", "?")) else "."
        return _fail(program, f"{message} See {program} --help.", UsageError.exit_code)
    return INTERRUPTED if code == _SHELL_INTERRUPTED else code


def _fail(program: str, message: str, code: int) -> int:
    print(f"{program}: {visible(message)}", file=sys.stderr)
    return code


def visible(text: str) -> str:
    """Text that is safe to print on a terminal: control characters, which could change it, are replaced by U+FFFD."""
    return _CONTROLS.sub("\ufffd", text)
