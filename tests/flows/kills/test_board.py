"""A board keeps what a process wrote on it, also when that process was killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.kills.board import Board

ROOT = Path(__file__).parents[3]
CHILD = """
import os, signal, sys
from pathlib import Path
from tests.benchmarks.kills.board import Board

board = Board(Path(sys.argv[1]))
board.mark("begun")
board.add("rows", 7)
with board.within("forward"), board.within("write"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_was_at_is_still_to_be_read(tmp_path: Path) -> None:
    board = Board(tmp_path / "board")
    before = time.monotonic_ns()
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "board")], cwd=ROOT, check=False)

    assert -signal.SIGKILL == done.returncode
    assert ("forward", "write") == board.phases()
    assert (7, 0) == (board["rows"], board["parts"])
    assert before < board["begun"] < time.monotonic_ns()


def test_a_phase_ends_with_its_block_and_the_first_time_stays(tmp_path: Path) -> None:
    board = Board(tmp_path / "board")
    with board.within("read"), board.within("read"):
        board.mark("begun")
        inside, first = board.phases(), board["begun"]
    board.mark("begun")

    assert (("read",), ()) == (inside, board.phases())
    assert first == board["begun"]
