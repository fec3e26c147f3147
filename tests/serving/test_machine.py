from __future__ import annotations

import gc
import os
import subprocess
import sys
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.machine import SharedSetting, count_cores, describe_machine, pause_garbage_collection, set_variable
from tests.child_environment import add_project

NAME = "OVERNIGHT_TEST_VARIABLE"


def test_a_machine_is_named_by_processor_cores_and_torch() -> None:
    assert f"{count_cores()} cores, torch {version('torch')}" in describe_machine()


def test_naming_the_machine_does_not_import_torch() -> None:
    code = "import sys, serving.machine as m; m.describe_machine(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "False" == done.stdout.strip()


def test_the_first_processor_names_them_all(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: A Chip\n\ncpu family\t: 6\nmodel name\t: Other\n")

    assert describe_machine(cpuinfo).startswith("A Chip 26.2, ")


def test_a_machine_without_a_file_of_processors_has_a_name_too(tmp_path: Path) -> None:
    assert not describe_machine(tmp_path / "absent").startswith(",")


@pytest.mark.parametrize("before", [None, "old"])
def test_a_variable_is_put_back_also_after_an_error(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NAME, raising=False)
    if before is not None:
        monkeypatch.setenv(NAME, before)

    with pytest.raises(RuntimeError, match="new"), set_variable(NAME, "new"):
        raise RuntimeError(os.environ[NAME])

    assert os.environ.get(NAME) == before


def test_the_collector_is_on_again_after_the_last_of_overlapping_pauses() -> None:
    assert gc.isenabled()
    with pause_garbage_collection():
        with pause_garbage_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


@given(st.permutations([0, 0, 1, 1, 2, 2]))
def test_blocks_that_overlap_put_a_setting_back_to_what_it_was_before_the_first(order: list[int]) -> None:
    values = ["before"]
    setting = SharedSetting(lambda: values[0], lambda value: values.__setitem__(0, value))
    blocks: dict[int, ExitStack] = {}
    for block in order:
        if block in blocks:
            blocks[block].close()
            continue
        blocks[block] = ExitStack()
        blocks[block].enter_context(setting.keep())
        values[0] = f"of block {block}"

    assert ["before"] == values


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with pause_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


_FREEZE = """
import gc
from serving.machine import freeze_objects
{before}
count = gc.get_freeze_count
first = count()
with freeze_objects():
    call = count()
    made = [[] for _ in range(1_000)]
    with freeze_objects():
        nested = count()
    with freeze_objects(again=True):
        again = count()
print(call > first, nested > call, again > nested, (count() > 0) == (first > 0))
"""


@pytest.mark.parametrize(
    ("before", "expected"),
    [("", "True False True True"), ("gc.freeze()", "False False False True")],
    ids=["nothing frozen", "frozen by the caller"],
)
def test_objects_are_frozen_while_a_block_runs_and_those_of_the_caller_stay_so(before: str, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FREEZE.format(before=before)],
        env=add_project(),
        capture_output=True,
        text=True,
        check=True,
    )

    assert expected == done.stdout.strip()


def test_a_block_that_fails_puts_the_collector_back() -> None:
    with pytest.raises(ZeroDivisionError), pause_garbage_collection():
        assert 1 / 0
    assert gc.isenabled()
