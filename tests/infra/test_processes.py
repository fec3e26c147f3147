import signal
import subprocess
import sys
import time

from infra.processes import children, family, kill_family, signal_all

# A parent, its child and the child's child: each says when it is there.
THREE = """
import subprocess, sys, time
depth = int(sys.argv[1])
if depth:
    subprocess.Popen([sys.executable, "-c", sys.argv[2], str(depth - 1), sys.argv[2]], start_new_session=True)
import os; os.write(1, b"%d\\n" % depth)
time.sleep(600)
"""


def start_three() -> subprocess.Popen[str]:
    started = subprocess.Popen([sys.executable, "-c", THREE, "2", THREE], stdout=subprocess.PIPE, text=True)
    assert started.stdout
    assert {"0", "1", "2"} == {started.stdout.readline().strip() for _ in range(3)}
    return started


def test_a_family_is_found_parents_first_and_ends_together_though_each_has_a_session_of_its_own() -> None:
    with start_three() as parent:
        pids = family(parent.pid)
        child, grandchild = pids[1:]

        assert [parent.pid, child, grandchild] == pids
        assert [child] == children(parent.pid)

        kill_family(parent.pid)

        assert -signal.SIGKILL == parent.wait()
        until = time.monotonic() + 30
        while (left := set(family(1)) & {child, grandchild}) and time.monotonic() < until:
            time.sleep(0.05)
        assert set() == left


def test_a_signal_to_a_process_that_is_gone_is_passed_over() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()

    signal_all([gone.pid], signal.SIGTERM)

    assert [gone.pid] == family(gone.pid)
