from __future__ import annotations

import configparser
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from infra.worker import drain_runs, kill_process_tree, list_children, list_process_tree, parse_arguments, send_signal

ROOT = Path(__file__).parents[2]

# A worker with two runs: one drains and says so in a file, the other does not listen.
WORKER = r"""
import subprocess, sys, time
good = "import signal, sys, time;"
good += "signal.signal(15, lambda *_: (time.sleep(1), open(sys.argv[1], 'w').close(), sys.exit()));"
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN);"
then = "import os; os.write(1, b'up\\n'); time.sleep(600)"
for code in sys.argv[2:]:
    subprocess.Popen([sys.executable, "-c", {"good": good, "deaf": deaf}[code] + then, sys.argv[1]])
time.sleep(600)
"""


def start_worker(mark: Path, *runs: str) -> subprocess.Popen[str]:
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(mark), *runs], stdout=subprocess.PIPE, text=True)
    assert worker.stdout
    assert ["up"] * len(runs) == [worker.stdout.readline().strip() for _ in runs]
    return worker


def test_a_run_has_drained_when_the_worker_ends(tmp_path: Path) -> None:
    with start_worker(tmp_path / "drained", "good") as worker:
        drain_runs(worker, grace_s=60)

        assert (tmp_path / "drained").exists()
        assert -9 == worker.returncode
        assert [worker.pid] == list_process_tree(worker.pid)


def test_a_run_that_does_not_listen_ends_with_the_grace_and_the_worker(tmp_path: Path) -> None:
    with start_worker(tmp_path / "drained", "good", "deaf") as worker:
        pids = list_process_tree(worker.pid)
        drain_runs(worker, grace_s=5)

        assert 3 == len(pids)
        assert (tmp_path / "drained").exists()
        assert set() == set(list_process_tree(1)) & set(pids[1:])


def test_the_systemd_unit_signals_only_this_worker_and_waits_longer_than_its_grace() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign] # the names of systemd have capitals
    unit.read(ROOT / "infra/systemd/overnight-worker@.service")
    service = unit["Service"]
    program, *arguments = shlex.split(service["ExecStart"].replace("%i", "overnight-spot").replace("%H", "host"))

    assert ("/opt/overnight/bin/python", ["-m", "infra.worker"]) == (program, arguments[:2])
    assert "overnight-spot" == parse_arguments(arguments[2:]).pool
    assert "mixed" == service["KillMode"]
    assert int(service["TimeoutStopSec"]) > parse_arguments(arguments[2:]).grace


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


def test_a_process_tree_is_listed_parents_first_and_killed_across_sessions() -> None:
    with start_three() as parent:
        pids = list_process_tree(parent.pid)
        child, grandchild = pids[1:]

        assert [parent.pid, child, grandchild] == pids
        assert [child] == list_children(parent.pid)

        kill_process_tree(parent.pid)

        assert -signal.SIGKILL == parent.wait()
        until = time.monotonic() + 30
        while (left := set(list_process_tree(1)) & {child, grandchild}) and time.monotonic() < until:
            time.sleep(0.05)
        assert set() == left


def test_a_signal_to_a_process_that_is_gone_is_passed_over() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()

    send_signal([gone.pid], signal.SIGTERM)

    assert [gone.pid] == list_process_tree(gone.pid)
