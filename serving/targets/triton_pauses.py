"""A pause of a model's process while Triton loads the model: the process then ends, and the model is loaded again.

In that process a thread of Triton's own reports every 0.3 s. If Triton hears nothing for a second, as where a virtual
machine is moved, it gives the process up: it frees the memory that they share, and waits for the process to end
(`StubLauncher::Launch` in its Python backend, 24.10). A process that goes on after that does harm. Paused while it
imports model.py, it then uses the freed memory, and Triton aborts with all its models. Paused later, it never ends,
and every load of that model hangs until Triton is started again. From 25.08 on Triton waits five seconds, and then
does the same, by its source.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

_TASKS = Path("/proc/self/task")
_TICK_S = 0.1
_REPORT_S = 0.3


def get_patience_s(version: str | None) -> float:
    """Return how long Triton hears nothing before it gives a process up.

    `version` is that of NVIDIA's container, which is in its environment, or None: the wheel, which is 24.10.
    """
    return 5.0 if (version or "24.10") >= "25.08" else 1.0


def is_pause(seconds: float, wakes: int, patience_s: float) -> bool:
    """Return whether a process stood still, by how often the thread that reports woke up in so many seconds.

    A thread of Python that comes late proves nothing: another may have held the interpreter's lock.
    """
    # A report that is on time may come just before the pause or after it.
    return seconds >= patience_s - _REPORT_S and wakes <= seconds / (2 * _REPORT_S)


class PauseWatch:
    """Ends this process as soon as it stood still, from the first line of its model.py to the end of the load.

    Make it before any other thread of the model's: those that are there by then are Triton's.
    """

    def __init__(self) -> None:
        own = str(threading.get_native_id())
        self._reporting = [each / "status" for each in _TASKS.iterdir() if each.name != own]
        self._patience_s = get_patience_s(os.environ.get("NVIDIA_TRITON_SERVER_VERSION"))
        self._lock = threading.Lock()
        # Triton's time-outs go by the clock of the day, which a machine that stood still may set at once.
        self._at, self._wakes = time.time(), self._count_wakes()
        self._loaded = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def check(self) -> None:
        """End this process if it stood still since it was last asked."""
        with self._lock:
            at, wakes = time.time(), self._count_wakes()
            seconds = at - self._at
            if self._reporting and is_pause(seconds, wakes - self._wakes, self._patience_s):
                told = f"This process stood still for {seconds:.1f} s while it loaded its model, and ends.\n"
                os.write(sys.stderr.fileno(), told.encode())
                os._exit(1)
            self._at, self._wakes = at, wakes

    def finish(self) -> None:
        """Check once more, and stop: the model is loaded."""
        self.check()
        self._loaded.set()

    def _watch(self) -> None:
        while not self._loaded.wait(_TICK_S):
            self.check()

    def _count_wakes(self) -> int:
        lines = (line for each in self._reporting for line in each.read_text().splitlines())
        return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches:"))
