"""Keeps one server beside its owner: whatever ends the owner, the server stops and its folder is swept.

Run by path, as ``python -I -S child_server.py FOLDER SERVER ARGUMENT...``, so that nothing but the standard library
is loaded. The owner holds the other end of standard input; the kernel closes it even after ``kill -9``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading


def keep(folder: str, command: list[str]) -> int:
    """Runs ``command`` until it ends or standard input closes, removes ``folder``, returns the exit status."""
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
