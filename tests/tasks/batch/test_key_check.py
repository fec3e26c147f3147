"""Whether keys are unique: found exactly, in bounded memory, whatever their types."""

from __future__ import annotations

import datetime as dt
import tempfile
from collections import Counter
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import KeysUnfit, RunDamaged, SourceCorrupt
from tasks.batch import key_check
from tasks.batch.key_check import DoubledKey, check_keys, describe_doubled, require_unique
from tasks.storage import Storage, open_storage
from tests.tasks.batch.small import parquet, put

DAY = dt.date(2026, 1, 1)
UTC = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
VALUES = {
    "int": pa.array([1, 2, None]),
    "unsigned": pa.array([1, 2**63, None], pa.uint64()),
    "text": pa.array(["a", "ü", None]),
    "large text": pa.array(["a", "ü", None], pa.large_string()),
    "binary": pa.array([b"\x00", b"\xff", None]),
    "date": pa.array([DAY, dt.date(2026, 1, 2), None]),
    "time": pa.array([UTC, dt.datetime(2026, 1, 2, tzinfo=dt.UTC), None], pa.timestamp("us", "UTC")),
    "decimal": pa.array([Decimal("1.10"), Decimal("-1.10"), None], pa.decimal128(38, 2)),
    "bool": pa.array([True, False, None]),
    "float": pa.array([1.5, float("nan"), None]),
    "list": pa.array([["x"], ["x", "y"], None]),
    "struct": pa.array([{"x": 1, "y": ["z"]}, {"x": 2, "y": None}, None]),
}


def put_keys(address: str, *tables: pa.Table) -> tuple[Storage, list[str]]:
    """Write tables of keys as files, and return where they are."""
    put(address, {f"run=a/{at}.parquet": table for at, table in enumerate(tables)})
    return open_storage(address), [f"run=a/{at}.parquet" for at in range(len(tables))]


def test_keys_that_occur_more_than_once_are_named_with_their_rows_the_most_frequent_first(place: str) -> None:
    storage, paths = put_keys(
        place, pa.table({"id": [1, 2, 3, 3], "x": [0, 0, 0, 0]}), pa.table({"id": [3, 2, 4], "x": [0, 0, 0]})
    )
    check = check_keys(storage, paths, ["id"])

    assert (7, 0, 2) == (check.rows, check.rows_key_null, check.doubled)
    assert (DoubledKey(values=(3,), rows=3), DoubledKey(values=(2,), rows=2)) == check.examples
    assert "2 keys occur more than once in id: 3 (3 rows), 2 (2 rows)." == describe_doubled(check)


def test_unique_keys_are_found_so(place: str) -> None:
    storage, paths = put_keys(place, *(pa.table({"id": np.arange(at, 1000, 3)}) for at in range(3)))
    check = check_keys(storage, paths, ["id"])
    require_unique(check, "a")

    assert (1000, 0, 0, ()) == (check.rows, check.rows_key_null, check.doubled, check.examples)


def test_a_wrong_bit_in_the_footer_of_a_part_is_passed_over_or_named_for_the_part(tmp_path: Path) -> None:
    # Names and texts of a footer are UTF-8 until a bit of them turns over.
    told = pa.table({"id": [1, 2]}, metadata={b"overnight.model": b"\xe3hurn"})
    storage, paths = put_keys(str(tmp_path), told, pa.table({"hd": [3]}))

    assert 2 == check_keys(storage, paths[:1], ["id"]).rows
    with pytest.raises(SourceCorrupt, match=r"1\.parquet must be readable, got: .*none called 'id'"):
        check_keys(storage, paths, ["id"])


def test_of_many_doubled_keys_ten_are_named(tmp_path: Path) -> None:
    storage, paths = put_keys(str(tmp_path), *(pa.table({"id": [f"{at:03d}" for at in range(100)]}),) * 2)
    check = check_keys(storage, paths, ["id"])

    assert 100 == check.doubled
    assert [(f"{at:03d}",) for at in range(10)] == [each.values for each in check.examples]
    assert describe_doubled(check).endswith("'009' (2 rows), and 90 more.")


@pytest.mark.parametrize("name", VALUES)
def test_keys_of_every_type_are_compared_and_nulls_equal_nothing(tmp_path: Path, name: str) -> None:
    storage, paths = put_keys(
        str(tmp_path), pa.table({"key": VALUES[name]}), pa.table({"key": VALUES[name].take(pa.array([1, 2, 2]))})
    )
    check = check_keys(storage, paths, ["key"])

    assert (3, 3, 1) == (check.rows, check.rows_key_null, check.doubled)
    assert [2] == [each.rows for each in check.examples]


def test_keys_of_several_columns_are_compared_together(tmp_path: Path) -> None:
    table = pa.table({"a": [1, 1, 2, None, 2], "b": ["x", "y", "x", "x", "x"]})
    storage, paths = put_keys(str(tmp_path), table)
    check = check_keys(storage, paths, ["b", "a"])

    assert (4, 1, 1) == (check.rows, check.rows_key_null, check.doubled)
    assert "1 key occurs more than once in b, a: ('x', 2) (2 rows)." == describe_doubled(check)


FILES = st.lists(st.lists(st.one_of(st.none(), st.integers(-9, 40)), min_size=1, max_size=30), min_size=1, max_size=6)


@settings(max_examples=60)
@given(files=FILES, memory_bytes=st.sampled_from([24, 240, 2400, 1 << 20]))
def test_what_is_found_is_what_a_counter_says_however_little_memory_there_is(
    files: list[list[int | None]], memory_bytes: int
) -> None:
    counted = Counter(key for keys in files for key in keys if key is not None)
    with tempfile.TemporaryDirectory() as place:
        storage, paths = put_keys(place, *(pa.table({"id": pa.array(keys, pa.int64())}) for keys in files))
        check = check_keys(storage, paths, ["id"], memory_bytes)

    assert sum(counted.values()) == check.rows
    assert sum(keys.count(None) for keys in files) == check.rows_key_null
    assert sum(rows > 1 for rows in counted.values()) == check.doubled
    assert all(each.rows == counted[each.values[0]] > 1 for each in check.examples)
    assert min(10, check.doubled) == len(check.examples)


def test_many_keys_in_many_runs_on_disk_are_found_to_be_unique_or_not(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).permutation(200_000)
    storage, paths = put_keys(str(tmp_path), *(pa.table({"id": part}) for part in np.split(keys, 10)))
    # Runs of 10,000 hashes, twenty of them.
    assert 0 == check_keys(storage, paths, ["id"], 240_000).doubled
    put(str(tmp_path), {"run=a/more.parquet": pa.table({"id": [77, 199_999]})})
    assert 2 == check_keys(storage, [*paths, "run=a/more.parquet"], ["id"], 240_000).doubled


def test_a_key_that_every_row_has_is_one_key(tmp_path: Path) -> None:
    storage, paths = put_keys(str(tmp_path), *(pa.table({"id": ["same"] * 20_000}),) * 5)
    check = check_keys(storage, paths, ["id"], 240_000)

    assert (100_000, 1, (DoubledKey(values=("same",), rows=100_000),)) == (check.rows, check.doubled, check.examples)


def test_keys_whose_hashes_alone_are_equal_are_not_taken_for_doubled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_check, "_hash_rows", lambda frame: (frame["id"].to_numpy() % 3).astype(np.uint64))
    storage, paths = put_keys(str(tmp_path), pa.table({"id": [0, 1, 3, 6]}), pa.table({"id": [1, 9]}))

    assert (DoubledKey(values=(1,), rows=2),) == check_keys(storage, paths, ["id"]).examples


def test_doubled_and_null_keys_are_refused_where_rows_are_replaced_by_them(tmp_path: Path) -> None:
    storage, paths = put_keys(str(tmp_path), pa.table({"id": ["a" * 100, "a" * 100, None]}))
    check = check_keys(storage, paths, ["id"])
    with pytest.raises(KeysUnfit, match=r"Every row must have a key .* 1 rows of run night have a null in id"):
        require_unique(check, "night")
    storage, paths = put_keys(str(tmp_path / "more"), pa.table({"id": ["a" * 100, "a" * 100]}))
    with pytest.raises(KeysUnfit, match=r"1 key occurs more than once in id: 'a{59}\.\.\. \(2 rows\)\. Nothing"):
        require_unique(check_keys(storage, paths, ["id"]), "night")


def test_a_file_that_is_gone_or_damaged_is_named(tmp_path: Path) -> None:
    storage, paths = put_keys(str(tmp_path), pa.table({"id": [1]}))
    with pytest.raises(RunDamaged, match=r"run=a/7\.parquet must be there"):
        check_keys(storage, [*paths, "run=a/7.parquet"], ["id"])
    torn = bytearray(parquet(pa.table({"id": np.arange(1000)}), write_page_checksum=True))
    torn[100] ^= 1
    storage.put_new("run=a/torn.parquet", bytes(torn))
    with pytest.raises(SourceCorrupt, match=r"torn\.parquet must be readable"):
        check_keys(storage, ["run=a/torn.parquet"], ["id"])
