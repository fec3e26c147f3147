"""Runs batch_inference in a process of its own, which is told to end at a named point.

usage: notice_child.py CLOCK SIGNALS POINT TIMES MODEL SOURCE DESTINATION OPTIONS_JSON
The TIMES-th time that it comes to POINT (of kill_child.py), it is sent SIGTERM, SIGNALS times. `own` for SIGNALS: once,
while the program has a handler of its own, which says so. With `batches` for CLOCK the clock of the run goes on by a
tenth of a second for each batch that begins, and the run once the signal is taken, however busy the machine is.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time

import tasks.batch.score
from serving.model.forward import Forward
from tasks.batch.chunk_scheduler import ScoringMachine
from tasks.spot.drain import Drain
from tests.flows import kill_child


def main() -> None:
    clock, signals = sys.argv.pop(1), sys.argv.pop(1)
    begun: list[object] = []
    noticed = threading.Event()

    def told() -> None:
        print("told", flush=True)
        for _ in range(1 if signals == "own" else int(signals)):
            os.kill(os.getpid(), signal.SIGTERM)
            if clock == "batches":
                noticed.wait()
            else:
                time.sleep(0.3)

    if clock == "batches":
        # What they call returns nothing: neither counts as the point.
        kill_child._before(Forward, "_begin_batch", lambda *_, **__: begun.append(None))
        kill_child._after(Drain, "add_notice", lambda *_, **__: noticed.set())
        tasks.batch.score.ScoringMachine = functools.partial(ScoringMachine, clock=lambda: len(begun) / 10)
    if signals == "own":
        signal.signal(signal.SIGTERM, lambda *_: print("the program's own handler heard it", flush=True))
    kill_child._die = told
    kill_child.main()


if __name__ == "__main__":
    main()
