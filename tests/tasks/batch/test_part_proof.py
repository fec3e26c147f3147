"""Parts of earlier runs are scored again: the same bytes prove them, and a lost source is no damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from serving.errors import BadInput
from tasks.batch.options import BatchOptions
from tasks.batch.part_proof import ProvingModel, count_sample, prove_reused_parts
from tasks.batch.parts import write_part
from tasks.batch.plan import Plan
from tasks.batch.verify import RunVerification, verify_run
from tasks.storage import open_storage
from tests.simulation.data import ToyModel
from tests.tasks.batch.small import forget_digests
from tests.tasks.batch.test_reuse import OPTIONS, call, write


def load(plan: Plan) -> ProvingModel:
    return ProvingModel(model=ToyModel(int(plan.model.version)), made_with=plan.made_with)


def prove(place: Path, plan: Plan, sample: str = "100%", seed: int = 7) -> RunVerification:
    storage = open_storage(str(place))
    return prove_reused_parts(storage, verify_run(storage, plan.run), sample, seed=seed, load=load)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Five files of 24 rows."""
    for at in range(5):
        write(tmp_path / "in" / f"f{at}.parquet", at * 100, 24, group=12)
    return tmp_path / "in"


@pytest.fixture(params=[("id",), ()], ids=["keys", "places"])
def plan(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> Plan:
    """The second run, which has eight of its ten parts from the first."""
    options = OPTIONS.model_copy(update={"key_columns": request.param})
    call(source, tmp_path / "out", options)
    write(source / "f4.parquet", 5000, 24, group=12)
    return call(source, tmp_path / "out", options)[0]


def list_files(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_all_reused_parts_are_scored_to_the_same_bytes_and_nothing_is_written(plan: Plan, tmp_path: Path) -> None:
    before = list_files(tmp_path / "out")
    result = prove(tmp_path / "out", plan)

    assert ("complete", 8, ()) == (result.state, result.parts_proved, result.damages)
    assert (
        "8 of 8 parts, chosen of 8 of earlier runs with seed 7, were scored again to the same bytes.",
    ) == result.notes
    assert before == list_files(tmp_path / "out")


@pytest.mark.parametrize(("sample", "count"), [("1%", 1), ("50%", 4), ("3", 3), ("900", 8)])
def test_a_sample_has_so_many_parts(plan: Plan, tmp_path: Path, sample: str, count: int) -> None:
    assert count == prove(tmp_path / "out", plan, sample).parts_proved


def change_value(path: Path) -> None:
    """Change one prediction of a part, and leave all else, checksums included, as they must be."""
    table = pq.read_table(path)
    values = table.column("y").to_pylist()
    at = next(row for row, value in enumerate(values) if value is not None)
    values[at] += 1.0
    changed = table.set_column(table.schema.get_field_index("y"), "y", pa.array(values))
    path.write_bytes(write_part(changed.replace_schema_metadata(table.schema.metadata).combine_chunks()))


def test_a_part_of_other_predictions_that_bears_no_digest_is_found_by_scoring_alone(plan: Plan, tmp_path: Path) -> None:
    path = plan.reused[3].path
    change_value(tmp_path / "out" / path)
    forget_digests(tmp_path / "out")
    read = verify_run(open_storage(str(tmp_path / "out")), plan.run)
    assert {"size"} >= {damage.kind for damage in read.damages}
    result = prove(tmp_path / "out", plan)

    assert [("bytes", path)] == [(each.kind, each.path) for each in result.damages if each.kind == "bytes"]
    assert "y in 1 rows" in result.damages[-1].message
    assert ("damaged", 9) == (result.state, result.parts_proved)
    assert "9 of 10 parts, chosen of 10 of earlier runs or without a digest with seed 7," in result.notes[-1]


def test_the_same_seed_chooses_the_same_parts(plan: Plan, tmp_path: Path) -> None:
    change_value(tmp_path / "out" / plan.reused[3].path)
    found = [bool(prove(tmp_path / "out", plan, "2", seed).parts_proved == 1) for seed in range(6) for _ in range(2)]

    assert found[::2] == found[1::2]
    assert {True, False} == set(found)


def test_other_versions_are_noted_since_last_digits_may_differ(plan: Plan, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "out"))
    other = ProvingModel(model=ToyModel(1), made_with=(*plan.made_with[1:], "another processor"))
    result = prove_reused_parts(storage, verify_run(storage, plan.run), "1", seed=1, load=lambda _: other)

    assert "so last digits may differ: " in result.notes[-1]
    assert "another processor" in result.notes[-1]


@pytest.mark.parametrize("change", ["gone", "changed", "all gone"])
def test_a_part_whose_source_is_not_what_it_was_can_not_be_proved(plan: Plan, tmp_path: Path, change: str) -> None:
    if change == "gone":
        (tmp_path / "in/f2.parquet").unlink()
    elif change == "changed":
        write(tmp_path / "in/f2.parquet", 7000, 24, group=12)
    else:
        shutil.rmtree(tmp_path / "in")
    result = prove(tmp_path / "out", plan)
    lost = 8 if change == "all gone" else 2

    assert ("complete", 8 - lost, ()) == (result.state, result.parts_proved, result.damages)
    assert f"{lost} parts can't be proved, since their source is not what it was: " in result.notes[1]


def test_a_run_of_its_own_parts_has_nothing_to_prove(source: Path, tmp_path: Path) -> None:
    plan, _ = call(source, tmp_path / "out")
    result = prove(tmp_path / "out", plan)

    assert ("complete", 0) == (result.state, result.parts_proved)
    assert ("It has no part of an earlier run: nothing was scored again.",) == result.notes


@pytest.mark.parametrize("sample", ["0%", "101%", "-1", "0", "a few", "1.5", ""])
def test_a_sample_that_does_not_read_is_refused(sample: str) -> None:
    with pytest.raises(BadInput, match="A sample must be a percentage such as 1% or 100%, or a number of parts"):
        count_sample(sample, 10)


class TestCopiesOfText:
    """Copies are deleted once a run is published, and are made again where they are not the destination's."""

    def write(self, path: Path, start: int) -> None:
        path.parent.mkdir(exist_ok=True)
        rows = range(start, start + 24)
        table = pa.table({"id": list(rows), "a": [row / 4 for row in rows], "b": [row / 8 for row in rows]})
        pyarrow.csv.write_csv(table, path)

    @pytest.fixture
    def plan(self, tmp_path: Path) -> Plan:
        options = OPTIONS.model_copy(update={"rows_per_chunk": 24})
        for at in range(4):
            self.write(tmp_path / f"in/f{at}.csv", at * 100)
        call(tmp_path / "in", tmp_path / "out", options)
        self.write(tmp_path / "in/f3.csv", 5000)
        return call(tmp_path / "in", tmp_path / "out", options)[0]

    def test_the_parts_are_scored_from_copies_that_are_made_again(self, plan: Plan, tmp_path: Path) -> None:
        before = list_files(tmp_path / "out")
        result = prove(tmp_path / "out", plan)

        assert (3, ()) == (result.parts_proved, result.damages)
        assert before == list_files(tmp_path / "out")

    def test_a_text_file_that_was_changed_since_is_noted(self, plan: Plan, tmp_path: Path) -> None:
        self.write(tmp_path / "in/f1.csv", 7000)
        (tmp_path / "in/f2.csv").unlink()
        result = prove(tmp_path / "out", plan)

        assert (1, ()) == (result.parts_proved, result.damages)
        assert "2 parts can't be proved" in result.notes[1]


def test_options_of_the_call_do_not_matter(source: Path, tmp_path: Path) -> None:
    """A run whose rejects were within the limit is proved whatever share of a part they are."""
    options = BatchOptions(**{**OPTIONS.model_dump(), "max_reject_fraction": 0.2})
    call(source, tmp_path / "out", options)
    write(source / "f4.parquet", 5000, 24, group=12)
    plan, _ = call(source, tmp_path / "out", options)

    assert 8 == prove(tmp_path / "out", plan).parts_proved
