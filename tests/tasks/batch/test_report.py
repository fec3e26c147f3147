"""The report says in numbers, words and a picture what a call came to."""

from __future__ import annotations

import base64

from tasks.batch.manifest import RejectCount
from tasks.batch.report import BatchReport, draw_progress, page

REPORT = BatchReport(
    status="scored",
    run="abc",
    model="models:/churn/3",
    model_digest="d",
    source="lake",
    destination="scores",
    output="parquet",
    rows=1_000,
    rejects=(RejectCount(column="age", reason="null", rows=7), RejectCount(column="", reason="<b>no</b>", rows=1)),
    rows_scored=800,
    rows_recomputed=0,
    parts=4,
    slots=2,
    batch_size=64,
    engine="one thread a slot",
    tuning=None,
    memory_mb=10,
    seconds={"score": 2.0},
    thread_seconds={"read": 0.1, "forward": 1.5},
    report="scores/report.html",
)


def test_rates_and_sums_come_from_the_counts() -> None:
    assert (8, 400.0) == (REPORT.rows_rejected, REPORT.rows_per_second)


def test_the_table_lists_rejects_by_column_and_reason() -> None:
    rows = {row[""].strip(): row["value"] for row in REPORT.table()}

    assert ("7", "1", "400") == (rows["age: null"], rows["model: <b>no</b>"], rows["rows a second"])


def test_the_table_counts_keys_that_are_null_where_there_are_any() -> None:
    with_nulls = REPORT.model_copy(update={"rows_key_null": 12})

    assert {"": "rows with a null key", "value": "12"} in with_nulls.table()
    assert "null key" not in REPORT.markdown()


def test_a_call_that_scored_nothing_claims_no_speed() -> None:
    complete = REPORT.model_copy(update={"status": "already complete", "rows_scored": 0})

    assert 0 == complete.rows_per_second
    assert "rows a second" not in complete.markdown()


def test_a_name_with_markup_is_shown_as_it_is() -> None:
    named = REPORT.model_copy(update={"model": "models:/a|b <i>*x* [y](http://z)/3", "source": "my_lake/x_1"})

    for text in (named.markdown(), named.summary()):
        assert r"| model | models:/a\|b \<i>\*x\* \[y\](http://z)/3 |" in text
    assert named.summary().startswith(r"# a\|b \<i>\*x\* \[y\](http://z)")
    assert r"\_" not in named.markdown()


def test_the_picture_of_a_call_has_its_rows_over_time_and_what_its_threads_did() -> None:
    picture = draw_progress(REPORT, [(0.0, 200), (1.0, 600), (2.0, 1_000)]).decode()

    for words in (
        f"{REPORT.rows_scored:,} rows at ",
        "rows with a part",
        "seconds, over all threads",
        *REPORT.thread_seconds,
    ):
        assert words in picture


def test_the_page_holds_its_pictures_and_escapes_what_models_say() -> None:
    progress, png = draw_progress(REPORT, [(0.0, 1_000)]), b"\x89PNG"
    text = page(REPORT, progress, {"how the predictions are distributed": png}).decode()

    for picture, kind in ((progress, "svg+xml"), (png, "png")):
        assert f"data:image/{kind};base64,{base64.b64encode(picture).decode()}" in text
    assert "&lt;b&gt;no&lt;/b&gt;" in text
    assert "<b>no</b>" not in text
    # What the run says of the rows comes before what it took.
    told = ("<title>churn v3 → scores</title>", "are distributed", "&lt;b&gt;no", "rows done over time", "seconds:")
    assert sorted(told, key=text.index) == [*told]
