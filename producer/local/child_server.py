"""Runs a server as long as the process that started it lives, then stops the server and removes its folder.

It is run by path, as ``python -I -S child_server.py FOLDER SERVER ARGUMENT...``, so that only the standard library is
loaded. The parent process holds the other end of standard input, which the kernel closes when it ends, however it ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading


def keep(folder: str, command: list[str]) -> int:
    """Runs a server until it ends or standard input is closed.

    Args:
        folder: Removed after the server has ended.
        command: The server's command line.

    Returns:
        The server's exit status.
    """
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as server:
        threading.Thread(target=_stop_with_owner, args=(server,), daemon=True).start()
        status = server.wait()
    shutil.rmtree(folder, ignore_errors=True)
    return status


def _stop_with_owner(server: subprocess.Popen[bytes]) -> None:
    while os.read(0, 4096):
        pass
    server.terminate()


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1], sys.argv[2:]))
