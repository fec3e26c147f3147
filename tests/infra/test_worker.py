import configparser
import shlex
import subprocess
import sys
from pathlib import Path

from infra.processes import family
from infra.worker import drain, parse

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
        drain(worker, grace_s=60)

        assert (tmp_path / "drained").exists()
        assert -9 == worker.returncode
        assert [worker.pid] == family(worker.pid)


def test_a_run_that_does_not_listen_ends_with_the_grace_and_the_worker(tmp_path: Path) -> None:
    with start_worker(tmp_path / "drained", "good", "deaf") as worker:
        pids = family(worker.pid)
        drain(worker, grace_s=5)

        assert 3 == len(pids)
        assert (tmp_path / "drained").exists()
        assert set() == set(family(1)) & set(pids[1:])


def test_the_systemd_unit_tells_this_worker_alone_and_waits_longer_than_its_grace() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign] # the names of systemd have capitals
    unit.read(ROOT / "infra/systemd/overnight-worker@.service")
    service = unit["Service"]
    program, *arguments = shlex.split(service["ExecStart"].replace("%i", "overnight-spot").replace("%H", "host"))

    assert ("/opt/overnight/bin/python", ["-m", "infra.worker"]) == (program, arguments[:2])
    assert "overnight-spot" == parse(arguments[2:]).pool
    assert "mixed" == service["KillMode"]
    assert int(service["TimeoutStopSec"]) > parse(arguments[2:]).grace
