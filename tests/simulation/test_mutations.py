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
        old='    if match is None or (match[3] or "") != plan.digest[:_DIGEST_SHOWN] or folder',
        new="    if match is None or folder",
    ),
    Edit(
        file="tasks/batch/parts.py",
        old="    made_of = {CHUNK_DIGEST: digest_chunk(plan, chunk)}\n",
        new="    made_of: dict[str, str] = {}\n",
    ),
)
PARTS_OF_OTHER_ROWS = (
    Edit(
        file="tasks/batch/plan.py",
        old="    told: list[object] = [plan.snapshot.identify(file), piece.row_group,",
        new="    told: list[object] = [piece.row_group,",
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

REUSED_PARTS_LISTED_ONCE = (
    Edit(
        file="tasks/batch/chunk_scheduler.py",
        old="        self._reused = reused\n",
        new="        self._reused = self._reused if any(self._reused) else reused\n",
    ),
)
CLEANING_TAKES_REUSED_PARTS = (
    Edit(
        file="tasks/batch/survey.py",
        old="        return needed | {part.path for plan in self.plans.values() for part in plan.reused}\n",
        new="        return needed\n",
    ),
)
CLEANING_TAKES_PARTS_FIRST = (
    Edit(
        file="tasks/batch/clean.py",
        old='    parts = [each for each in removable if each.kind == "part"]\n',
        new='    parts = [each for each in removable if each.kind == "part"]\n    _delete_all(storage, parts)\n',
    ),
)
CLEANING_KEEPS_THE_OLDEST = (
    Edit(
        file="tasks/batch/clean.py",
        old="key=lambda manifest: manifest.position, reverse=True",
        new="key=lambda manifest: manifest.position",
    ),
)

JUDGED_BY_SOME_ROWS = (
    Edit(
        file="tasks/batch/gate_records.py",
        old="    if not summed or rows != plan.rows:\n",
        new="    if not summed:\n",
    ),
)
APPROVED_BY_A_REFUSAL = (
    Edit(
        file="tasks/batch/gate_records.py",
        old='    return storage.exists(f"{ROOT}/{run}/approved-',
        new='    return storage.exists(f"{ROOT}/{run}/refused-',
    ),
)
UPSERT_KEEPS_OLD_ROWS = (
    Edit(file="tasks/batch/upsert.py", old="    is_left[matched] = False\n", new="    is_left[matched[1:]] = False\n"),
)
REWRITTEN_FILES_NOT_LOOKED_AT = (
    Edit(
        file="tasks/batch/upsert.py",
        old="    _put_whole(storage, path, data)\n",
        new="    storage.put_new(path, data)\n",
    ),
    # The storage seldom loses what an upsert has written of all that is written.
    Edit(
        file="tests/simulation/storage.py",
        old="        if fault is None:\n",
        new='        if path.startswith("rewritten/") and self._draw(0.3):\n'
        '            fault = "lost"\n        if fault is None:\n',
    ),
)
UPSERT_OF_DOUBLED_KEYS = (
    Edit(file="tasks/batch/key_check.py", old="        require_unique(check, plan.run)\n", new="        pass\n"),
)


@pytest.mark.machines
@pytest.mark.parametrize(
    ("edits", "first", "seen"),
    [
        pytest.param(PARTS_OF_ANY_PLAN, 112, "rows missing", id="parts of one plan count for another"),
        pytest.param(PARTS_OF_OTHER_ROWS, 65, "rows missing", id="a run has parts of other rows from an earlier one"),
        pytest.param(CREATE_ONLY_NOT_PROBED, 373, "", id="a store that overwrites is not found out"),
        pytest.param(NEWEST_BY_CLOCK, 88, "none of the newest runs", id="the newest run is so by a clock"),
        pytest.param(DELTA_GOES_BACK, 35, "went back", id="an older run replaces a newer one in a Delta table"),
        pytest.param(REUSED_PARTS_LISTED_ONCE, 195, "no end", id="a part of an earlier run is lost in a pass"),
        pytest.param(CLEANING_TAKES_REUSED_PARTS, 187, "which run", id="a cleaning takes what an unfinished run has"),
        pytest.param(CLEANING_TAKES_PARTS_FIRST, 0, "which run", id="a cleaning takes parts before records"),
        pytest.param(CLEANING_KEEPS_THE_OLDEST, 0, "it drops run", id="a cleaning keeps the oldest runs"),
        pytest.param(JUDGED_BY_SOME_ROWS, 25, "is judged by", id="a gate judges a run by some of its rows"),
        pytest.param(APPROVED_BY_A_REFUSAL, 5, "nobody has approved it", id="what was refused once is approved"),
        pytest.param(UPSERT_KEEPS_OLD_ROWS, 26, "do not make", id="an upsert leaves a row beside the new one"),
        pytest.param(
            *(REWRITTEN_FILES_NOT_LOOKED_AT, 26, "the table can't be read"), id="a file of an upsert is lost or torn"
        ),
        pytest.param(UPSERT_OF_DOUBLED_KEYS, 325, "has a key twice", id="keys of an upsert are not checked"),
    ],
)
def test_the_simulation_finds_a_defect_that_is_put_back(
    edits: tuple[Edit, ...], first: int, seen: str, tmp_path: Path
) -> None:
    found = find_violation(edits, tmp_path, first=first, seeds=2000, seen=seen)

    assert seen in found


@pytest.mark.parametrize(
    "edits",
    [
        *(PARTS_OF_ANY_PLAN, PARTS_OF_OTHER_ROWS, CREATE_ONLY_NOT_PROBED, NEWEST_BY_CLOCK, DELTA_GOES_BACK),
        *(REUSED_PARTS_LISTED_ONCE, CLEANING_TAKES_REUSED_PARTS, CLEANING_TAKES_PARTS_FIRST, CLEANING_KEEPS_THE_OLDEST),
        *(JUDGED_BY_SOME_ROWS, APPROVED_BY_A_REFUSAL),
        *(UPSERT_KEEPS_OLD_ROWS, REWRITTEN_FILES_NOT_LOOKED_AT, UPSERT_OF_DOUBLED_KEYS),
    ],
)
def test_what_is_mutated_stands_in_the_project(edits: tuple[Edit, ...], tmp_path: Path) -> None:
    mutate(edits, tmp_path)


def test_a_text_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="to be mutated"):
        mutate((Edit(file="tasks/batch/plan.py", old="no such text", new=""),), tmp_path)
