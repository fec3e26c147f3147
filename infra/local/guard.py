"""Run one server on behalf of a starter, and end its whole process group once the starter is gone.

Started as `python -I -S guard.py GRACE_S ARGV...` by process.py, standard library only, so that it is up in
milliseconds. Standard input is a pipe whose write end only the starter holds: end of file means "stop",
whether the starter closed it or was killed. Standard output takes one line, the server's process id.
Standard error is the server's log. The exit code is the server's, 128 + N after signal N, 127 if it could
not be started. On Linux the processes that a server starts in groups of their own end with it too, even where it
was killed and could not end them: they would go on answering on its port.
"""

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_LIFELINE = 0
_REPORT = 1
_LOG = 2
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_ORPHAN_CHECK_S = 1.0
_REAP_POLL_S = 0.02
_PR_SET_CHILD_SUBREAPER = 36


def main(argv: Sequence[str]) -> int:
    """Hold the server until it ends or the starter is gone; return the exit code to report."""
    grace_s, server_argv = float(argv[0]), list(argv[1:])
    starter = os.getppid()
    signal_pipe = _write_signals_to_pipe()
    _adopt_orphans()
    try:
        server = _spawn(server_argv)
    except OSError as error:
        os.write(_LOG, f"{server_argv[0]} must be an executable file, got: {error}.\n".encode())
        return 127
    os.write(_REPORT, f"{server}\n".encode())
    os.close(_REPORT)

    exit_code = _wait_for_end_or_stop(server, starter, signal_pipe)
    if exit_code is None:
        _signal_group(server, signal.SIGTERM)
        exit_code = _wait_for_end(server, grace_s)
    # Processes left in the server's group had their time to end; a server that hangs is ended by this.
    _signal_group(server, signal.SIGKILL)
    if exit_code is None:
        exit_code = _exit_code(os.waitpid(server, 0)[1])
    _end_orphans()
    return exit_code


def _write_signals_to_pipe() -> int:
    """Return the end of a pipe into which signals are written as bytes.

    A handler, unlike SIG_IGN, is not inherited by the server.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    for number in (*_STOP_SIGNALS, signal.SIGCHLD):
        signal.signal(number, lambda _number, _frame: None)
    return wake_read


def _spawn(argv: list[str]) -> int:
    """Start the server in a process group of its own, with no signal ignored or blocked.

    A starter that a shell put in the background with `&` would pass on an ignored SIGINT.
    """
    return os.posix_spawnp(
        argv[0],
        argv,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, _LIFELINE, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, _LOG, _REPORT),
        ],
        setpgroup=0,
        setsigmask=(),
        setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
    )


def _wait_for_end_or_stop(server: int, starter: int, signal_pipe: int) -> int | None:
    """Return the server's exit code, or None as soon as it is to be stopped."""
    while True:
        readable, _, _ = select.select([_LIFELINE, signal_pipe], [], [], _ORPHAN_CHECK_S)
        woken_by = os.read(signal_pipe, 4096) if signal_pipe in readable else b""
        exit_code = _reap(server)
        if exit_code is not None:
            return exit_code
        # A process forked in C keeps a copy of the lifeline, so the parent's id is asked as well.
        orphaned = os.getppid() != starter
        if _LIFELINE in readable or orphaned or set(woken_by) & set(_STOP_SIGNALS):
            return None


def _wait_for_end(server: int, grace_s: float) -> int | None:
    """Return the server's exit code, or None if it still runs after the grace."""
    deadline = time.monotonic() + grace_s
    while (exit_code := _reap(server)) is None and time.monotonic() < deadline:
        time.sleep(_REAP_POLL_S)
    return exit_code


def _reap(server: int) -> int | None:
    """Return the server's exit code once it has ended; its orphans that have ended are reaped too."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in (0, server):
            return _exit_code(status) if pid else None


def _adopt_orphans() -> None:
    """Have what the server leaves behind become children of this process, where the system can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_orphans() -> None:
    """End every process that the server has left, and what those leave in their turn."""
    # Without an orphan, as where none is adopted, there is no child to wait for.
    with suppress(ChildProcessError):
        while True:
            for pid in _list_children():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(_REAP_POLL_S)


def _list_children() -> list[int]:
    children = []
    for entry in Path("/proc").glob("[0-9]*"):
        # One may have ended since it was listed.
        with suppress(OSError):
            # The name comes second, in parentheses, and may itself hold spaces and parentheses.
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == str(os.getpid()):
                children.append(int(entry.name))
    return children


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        # No process is left; macOS answers "not permitted" where only a zombie is.
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
