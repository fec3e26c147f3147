"""The simulation sees the defects that it is there for: each is put back into a copy of the project, and found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.simulation.mutations import Edit, find_violation, mutate

PARTS_OF_ANY_PLAN = (
    Edit(
        file="tasks/batch/parts.py",
        old='    return f"-{plan_digest[:_DIGEST_SHOWN]}.parquet" if plan_digest else ".parquet"\n',
        new='    return ".parquet"\n',
    ),
    Edit(
        file="tasks/batch/parts.py",
        old="    if chunk is not None:\n        identity |=",
        new="    if False:\n        identity |=",
    ),
)
CREATE_ONLY_NOT_PROBED = (
    Edit(
        file="tasks/storage/base.py",
        old="    if storage.put_new(_PROBE, told) and storage.put_new(",
        new="    if False and storage.put_new(",
    ),
)
NEWEST_BY_CLOCK = (
    Edit(
        file="tasks/batch/manifest.py",
        old="key=lambda manifest: manifest.position, default=None",
        new="key=lambda manifest: manifest.planned_at, default=None",
    ),
)
DELTA_GOES_BACK = (Edit(file="tasks/batch/delta.py", old="    if held > plan.order:\n", new="    if False:\n"),)


@pytest.mark.machines
@pytest.mark.parametrize(
    ("edits", "seen"),
    [
        pytest.param(PARTS_OF_ANY_PLAN, "rows missing", id="parts of one plan count for another"),
        pytest.param(CREATE_ONLY_NOT_PROBED, "", id="a store that overwrites is not found out"),
        pytest.param(NEWEST_BY_CLOCK, "none of the newest runs", id="the newest run is so by a clock"),
        pytest.param(DELTA_GOES_BACK, "went back", id="an older run replaces a newer one in a Delta table"),
    ],
)
def test_the_simulation_finds_a_defect_that_is_put_back(edits: tuple[Edit, ...], seen: str, tmp_path: Path) -> None:
    found = find_violation(edits, tmp_path, seeds=2000, seen=seen)

    assert seen in found


@pytest.mark.parametrize("edits", [PARTS_OF_ANY_PLAN, CREATE_ONLY_NOT_PROBED, NEWEST_BY_CLOCK, DELTA_GOES_BACK])
def test_what_is_mutated_stands_in_the_project(edits: tuple[Edit, ...], tmp_path: Path) -> None:
    mutate(edits, tmp_path)


def test_a_text_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="to be mutated"):
        mutate((Edit(file="tasks/batch/plan.py", old="no such text", new=""),), tmp_path)
