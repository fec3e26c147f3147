"""A run that is told to end by SIGTERM, at any step, is gone before the kill, and completed by the next call."""

from __future__ import annotations

import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.local.prefect_server import PrefectServer
from tasks.batch.options import BatchOptions, Ray
from tests.flows.children import call, score, start_child
from tests.support import digests, register_sleepy, write_customers

ROWS, CHUNK = 4_000, 400
# Twenty batches of a twentieth of a second: a chunk takes a second at least.
OPTIONS = BatchOptions(key_columns=("customer",), batch_size=20, rows_per_chunk=CHUNK, slots=2, experiment=None)
# The plan stands: what completes a run may have any number of slots.
COMPLETE = OPTIONS.model_copy(update={"slots": 8})
SENTENCE = re.compile(
    r"serving\.errors\.Interrupted: Interrupted by SIGTERM: ([\d,]+) of 4,000 rows of run \w+ are done and stay, "
    r"([\d,]+) are left(?:; unfinished chunks dropped: (\d))?; the same call resumes\."
)

POINTS = [("reading", 4), ("before a batch", 50), ("encoding a part", 3), ("a part half written", 3)]
OUTSIDE = [("before the plan", 1), ("before the audit", 1), ("before the page", 1), ("before the manifest", 1)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_customers(tmp_path_factory.mktemp("sigterm") / "customers", rows=ROWS, files=2, rows_per_group=CHUNK)


@pytest.fixture(scope="module")
def undisturbed(
    sleepy: str, source: Path, prefect: PrefectServer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    return score(sleepy, source, tmp_path_factory.mktemp("undisturbed"), OPTIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a child ended: -9 where it had not by the end of its notice, and was killed."""

    code: int
    stdout: str
    stderr: str
    left: dict[str, str]

    @property
    def said(self) -> re.Match[str]:
        """What it says of rows done, rows left, and chunks dropped, once; Prefect may have a last word of its own."""
        found = [match for line in self.stderr.splitlines() if (match := SENTENCE.fullmatch(line))]
        assert 1 == len(found), self.stderr
        return found[0]


def told_to_end(
    signals: str,
    point: tuple[str, int],
    where: tuple[str, Path, Path],
    options: BatchOptions = OPTIONS,
    *,
    clock: str = "real",
    killed_after: float = 240,
) -> Ended:
    """Run a child that gets SIGTERM at a point, and kill it some time after, as who sent it would."""
    arguments = (clock, signals, point[0], str(point[1]), *call(*where, options))
    with start_child("notice_child.py", *arguments, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        told = child.stdout.readline()
        try:
            stdout, stderr = child.communicate(timeout=killed_after)
        except subprocess.TimeoutExpired:
            child.kill()
            stdout, stderr = child.communicate()
    assert "told\n" == told, stderr
    return Ended(code=child.returncode, stdout=stdout, stderr=stderr, left=digests(where[2]))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("seconds", "clock", "points"),
    [(30, "batches", POINTS[1::2]), pytest.param(120, "real", POINTS, marks=pytest.mark.machines)],
    ids=["batches", "real"],
)
def test_it_finishes_the_chunks_in_hand_at_every_point_of_one_and_leaves_within_the_notice(
    sleepy: str,
    source: Path,
    undisturbed: dict[str, str],
    tmp_path: Path,
    seconds: int,
    clock: str,
    points: list[tuple[str, int]],
) -> None:
    from flows.batch import batch_inference

    options = OPTIONS.model_copy(update={"notice_seconds": seconds})
    killed_after = seconds if clock == "real" else 240

    def end_at(point: tuple[str, int]) -> Ended:
        where = sleepy, source, tmp_path / point[0]
        return told_to_end("1", point, where, options, clock=clock, killed_after=killed_after)

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(end_at, points))

    assert len(undisturbed) == ROWS // CHUNK
    for point, end in zip(points, ended, strict=True):
        rows_done, rows_left, dropped = end.said.groups()
        parts = {name for name in end.left if name.startswith("part-")}
        assert (1, None) == (end.code, dropped), (point, end.stderr)
        assert CHUNK * len(parts) == int(rows_done.replace(",", "")) == ROWS - int(rows_left.replace(",", ""))
        assert 1 <= len(parts) < len(undisturbed), point
        assert end.left.items() <= undisturbed.items(), point
        report = batch_inference(sleepy, str(source), str(tmp_path / point[0]), COMPLETE)
        assert ROWS - CHUNK * len(parts) == report.rows_scored
        assert undisturbed == digests(tmp_path / point[0])


@pytest.mark.machines
@pytest.mark.timeout(600)
def test_it_ends_at_once_where_no_chunk_is_in_hand(
    sleepy: str, source: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(lambda at: told_to_end("1", at, (sleepy, source, tmp_path / at[0])), OUTSIDE))

    assert [-signal.SIGTERM] * len(OUTSIDE) == [end.code for end in ended], [end.stderr for end in ended]
    for point, _ in OUTSIDE:
        assert undisturbed == score(sleepy, source, tmp_path / point, OPTIONS)


def test_it_drops_chunks_that_do_not_fit_in_the_time_left(
    sleepy: str, source: Path, prefect: PrefectServer, tmp_path: Path
) -> None:
    options = OPTIONS.model_copy(update={"notice_seconds": 1.0, "slots": 1})
    # A few batches into the second chunk, which takes two seconds as the first one did.
    end = told_to_end("1", ("before a batch", 25), (sleepy, source, tmp_path), options, clock="batches")

    assert (1, "1") == (end.code, end.said[3]), end.stderr
    assert 1 == len(end.left)
    assert end.left.items() <= score(sleepy, source, tmp_path, COMPLETE).items()


def test_a_pass_that_outlasts_the_notice_is_ended_with_its_process(
    registry: Path, source: Path, prefect: PrefectServer, tmp_path: Path
) -> None:
    endless = register_sleepy("endless", seconds=600)
    options = OPTIONS.model_copy(update={"notice_seconds": 2.0})
    end = told_to_end("1", ("before a batch", 2), (endless, source, tmp_path), options)

    # Both passes are ended when the notice is over, and by a moment the call ends before or after its threads.
    assert end.code in {1, -signal.SIGTERM}, end.stderr
    assert re.search(r"Interrupted( by SIGTERM)?: 0 of 4,000 rows", end.stderr), end.stderr
    assert {} == end.left


@pytest.mark.machines
def test_a_second_sigterm_ends_it_at_once(registry: Path, source: Path, prefect: PrefectServer, tmp_path: Path) -> None:
    endless = register_sleepy("endless", seconds=600)
    options = OPTIONS.model_copy(update={"notice_seconds": 600.0})
    end = told_to_end("2", ("before a batch", 2), (endless, source, tmp_path), options)

    assert -signal.SIGTERM == end.code, end.stderr
    assert "SIGTERM: this process is to end within 600 s: chunks in progress are finished where they fit" in end.stderr


@pytest.mark.machines
def test_the_programs_own_handler_hears_the_signal_once_the_chunks_in_hand_are_done(
    sleepy: str, source: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    end = told_to_end("own", ("before a batch", 50), (sleepy, source, tmp_path))

    assert 1 == end.code, end.stderr
    assert "the program's own handler heard it\n" == end.stdout
    assert end.said[3] is None


@pytest.mark.machines
@pytest.mark.timeout(600)
def test_on_ray_it_stops_every_slot_and_the_next_call_completes_the_run(
    sleepy: str, source: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("prefect_ray", reason="Ray is an extra: pip install 'overnight[ray]'")
    options = OPTIONS.model_copy(update={"runner": Ray(), "rows_per_chunk": CHUNK})
    # The driver lists the parts to show how far it is: slots are at work by then.
    end = told_to_end("1", ("rows are done", 1), (sleepy, source, tmp_path), options)
    completed = score(sleepy, source, tmp_path, COMPLETE)

    assert 1 == end.code, end.stderr
    assert end.left.items() <= undisturbed.items()
    assert len(end.left) < len(undisturbed)
    assert undisturbed == completed
