"""What was read is counted to the byte, and sorted by what it was of."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tasks.storage import open_storage
from tests.benchmarks.kills.reads import TRACED, Layout, Range, Read, lay_out, tally, traced_reads
from tests.tasks.batch.small import a_plan, numbers, parquet, put

LAYOUTS = {
    "half": Layout(footer=200, finished=(Range(start=4, stop=100),), bytes_remaining=100),
    "done": Layout(footer=200, finished=(Range(start=4, stop=200),), bytes_remaining=0),
}


def read(address: str, start: int | None, size: int, at: float = 1.0) -> Read:
    return Read(address=address, start=start, size=size, at=at)


def test_a_resume_that_reads_what_is_left_has_read_nothing_else() -> None:
    found = tally([read("half", 150, 70), read("half", 100, 100), read("part", 0, 9, 6.0)], LAYOUTS, ["part"], 5.0)

    assert (100, 170, 70) == (found.bytes_remaining, found.bytes_read, found.bytes_read_of_footers)
    assert 1.0 == found.read_over_remaining
    assert (0, 0, 0) == (
        found.bytes_read_of_finished_rows,
        found.finished_files_opened,
        found.finished_parts_opened_before_publishing,
    )
    assert 9 == found.bytes_read_of_parts_in_publishing


@pytest.mark.parametrize(
    ("stray", "name", "expected"),
    [
        (read("half", 60, 60), "bytes_read_of_finished_rows", 40),
        (read("half", None, 30), "bytes_read_of_finished_rows", 30),
        (read("done", None, 0), "finished_files_opened", 1),
        (read("part", None, 0, 4.0), "finished_parts_opened_before_publishing", 1),
    ],
)
def test_whatever_is_finished_and_read_is_found(stray: Read, name: str, expected: int) -> None:
    found = tally([read("half", 100, 100), stray], LAYOUTS, ["part"], 5.0)

    assert expected == getattr(found, name)


def of_columns(path: Path, group: int) -> tuple[int, int]:
    """Where the columns a and b of a row group begin, and their bytes."""
    found = pq.read_metadata(path).row_group(group)
    columns = [found.column(at) for at in (1, 2)]
    start = columns[0].dictionary_page_offset or columns[0].data_page_offset
    return start, sum(column.total_compressed_size for column in columns)


def test_the_layout_of_a_source_is_what_its_footers_say(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    files = {f"{name}.parquet": parquet(numbers(0, 40), row_group_size=20) for name in "ab"}
    plan = a_plan(put(str(folder), files), str(tmp_path / "out"), batch_size=5)
    layouts = lay_out(plan, open_storage(str(folder)), plan.chunks.keys() - {(0, 3)})
    first, second = (layouts[str(folder / name)] for name in files)
    footer = pq.read_metadata(folder / "a.parquet").serialized_size + 8
    groups = [of_columns(folder / "a.parquet", group) for group in (0, 1)]

    assert 8 == len(plan.chunks)
    assert len(files["a.parquet"]) - footer == first.footer
    assert (Range(start=groups[0][0], stop=sum(groups[0])),) == first.finished
    assert groups[1][1] // 2 == first.bytes_remaining
    assert (0, 2) == (second.bytes_remaining, len(second.finished))


@pytest.mark.skipif(shutil.which("strace") is None, reason="apt-get install strace")
def test_the_kernels_log_tells_every_opening_and_reading(tmp_path: Path) -> None:
    put(str(tmp_path), {"a.parquet": parquet(numbers(0, 40), row_group_size=20), "b.parquet": numbers(0, 9)})
    path, traces = tmp_path / "a.parquet", tmp_path / "traces"
    traces.mkdir()
    code = f"""
import mmap, pathlib, threading, pyarrow as pa, pyarrow.parquet as pq
path = {str(path)!r}
reading = threading.Thread(target=lambda: pq.ParquetFile(pa.OSFile(path, "rb")).read_row_group(1, columns=["a"]))
reading.start()
reading.join()
pathlib.Path(path).read_bytes()
with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
    pass
"""
    tracer = ["strace", "-ff", "-y", "-ttt", "-s", "0", "-e", f"trace={TRACED}", "-o", str(traces / "of")]
    done = subprocess.run([*tracer, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "Operation not permitted" in done.stderr:
        pytest.skip("this machine does not let a process be traced")
    found = traced_reads(traces)
    placed = [(one.start, one.size) for one in found if one.address == str(path) and one.start is not None]
    column = pq.read_metadata(path).row_group(1).column(1)
    size = path.stat().st_size

    assert (0, done.stderr) == (done.returncode, "")
    # The footer, the column, and the mapping; then all of it once more, at no place that the call tells.
    assert [(0, size), (column.dictionary_page_offset, column.total_compressed_size), (0, size)] == placed
    assert size == sum(one.size for one in found if one.address == str(path) and one.start is None)
    assert str(tmp_path / "b.parquet") not in {one.address for one in found}
