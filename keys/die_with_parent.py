"""A small program that becomes, or watches over, another one so that it never outlives its parent.

`keys.kept_process` runs this file by its path, in a fresh interpreter, because what must be set
stands between fork and exec, where a threaded parent may run no code of its own. Usage:

    python die_with_parent.py kernel PARENT_PID PROGRAM ARGUMENT…
    python die_with_parent.py pipe PARENT_PID PROGRAM ARGUMENT…

`kernel` (Linux, prctl(2) PR_SET_PDEATHSIG) replaces itself by the program and the kernel kills
that when the thread that started it ends. `pipe` (elsewhere) stays, and stops the program when its
standard input, the other end of which only the parent holds, is closed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading

_PR_SET_PDEATHSIG = 1
_GRACE_S = 5.0


def main(arguments: list[str]) -> int:
    """Run the program. Returns its exit status (`pipe`), or not at all (`kernel`)."""
    mode, parent, *command = arguments
    os.umask(0o077)
    if mode == "kernel":
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
            return 70
        # The parent may have died before the call above: then nobody would tell us.
        if os.getppid() != int(parent):
            return 71
        os.execv(command[0], command)  # noqa: S606 - no shell is wanted
    return _watch(command)


def _watch(command: list[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def stop(*_: object) -> None:
        child.terminate()

    def stop_at_end_of_input() -> None:
        while sys.stdin.buffer.read(1):
            pass
        child.terminate()
        try:
            child.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=stop_at_end_of_input, daemon=True).start()
    return child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
