"""Runs batch_inference in a process of its own, which is told to end at a named point.

usage: notice_child.py SIGNALS POINT TIMES MODEL SOURCE DESTINATION OPTIONS_JSON
The TIMES-th time that it comes to POINT (of kill_child.py), it is sent SIGTERM, SIGNALS times. `own` for SIGNALS: once,
while the program has a handler of its own, which says so.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from tests.flows import kill_child


def main() -> None:
    signals = sys.argv.pop(1)

    def told() -> None:
        print("told", flush=True)
        for _ in range(1 if signals == "own" else int(signals)):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    if signals == "own":
        signal.signal(signal.SIGTERM, lambda *_: print("the program's own handler heard it", flush=True))
    kill_child._die = told
    kill_child.main()


if __name__ == "__main__":
    main()
