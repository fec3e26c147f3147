from __future__ import annotations

import configparser
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infra.worker import (
    describe_open_connection,
    drain_runs,
    kill_process_tree,
    list_children,
    list_process_tree,
    parse_arguments,
    send_signal,
)
from tests.eventually import eventually

pytestmark = pytest.mark.servers

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


def test_runs_drain_where_a_worker_is_killed(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time; from infra.worker import drain_if_killed;"
        "worker = subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]);"
        "block = drain_if_killed(worker, 60); block.__enter__(); print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", program, WORKER, str(tmp_path / "drained"), "good", "good"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout
        assert {"held", "up"} == {first.stdout.readline().strip() for _ in range(3)}
        pids = list_process_tree(first.pid)
        first.kill()
        first.wait()
        eventually(lambda: not set(list_process_tree(1)) & set(pids))

    assert 5 == len(pids)
    assert (tmp_path / "drained").exists()


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
        eventually(lambda: set(list_process_tree(1)) & {child, grandchild}, lambda left: not left)


def test_a_signal_to_a_process_that_is_gone_is_passed_over() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()

    send_signal([gone.pid], signal.SIGTERM)

    assert [gone.pid] == list_process_tree(gone.pid)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "https://prefect.example/api",
            "http://127.0.0.1:4200/api",
            "http://localhost:4200/api",
            "http://[::1]:4200/api",
        ),
        *("http://127.8.8.8/api", "", "not an address"),
    ],
)
def test_a_worker_takes_work_by_https_and_on_its_own_machine(url: str) -> None:
    assert "" == describe_open_connection(url)


@pytest.mark.parametrize("host", ["prefect.example", "10.0.0.7", "localhost.example", "127.0.0.1.example"])
def test_a_worker_takes_no_work_from_another_machine_by_http_and_tells_no_password(host: str) -> None:
    said = describe_open_connection(f"http://me:secret@{host}:4200/api")

    assert f"got http to {host}." in said
    assert "--plain-http" in said
    assert "secret" not in said


def test_a_worker_with_an_open_connection_in_its_profile_ends_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "profiles.toml").write_text(
        'active = "far"\n[profiles.far]\nPREFECT_API_URL = "http://prefect.invalid:4200/api"\n'
    )
    without = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-m", "infra.worker", "--pool", "overnight"],
        env={**without, "PREFECT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (1, "") == (done.returncode, done.stdout)
    assert "must reach it by https or on this machine; got http to prefect.invalid" in done.stderr


# The first process of a namespace: infra.worker, with a program in Prefect's place whose grandchild ends.
FIRST = """
import os, signal, subprocess, sys, time
import infra.worker as worker
worker._describe_missing_pool = lambda pool: ""
child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', '']); import os; os._exit(0)"
code = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {child!r}]); time.sleep(3)"
worker._make_command = lambda options: [sys.executable, "-c", code]
status = worker.main(["--pool", "any", "--plain-http"])
left = [each for each in os.listdir("/proc") if each.isdigit() and each != "1"]
print(os.getpid(), status, left)
"""


def test_as_the_first_process_of_a_container_it_leaves_no_ended_process_behind() -> None:
    if not shutil.which("unshare") or os.geteuid() != 0:
        pytest.skip("a namespace of processes needs root and unshare, of Debian's util-linux")
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", FIRST],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert "1 0 []" == done.stdout.strip(), done.stderr
