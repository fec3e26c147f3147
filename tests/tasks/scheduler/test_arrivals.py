from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from serving.errors import BadWorkload
from serving.gateway.metering import MeteredRequest as Line
from serving.gateway.metering import MeteringLog
from tasks.scheduler.arrivals import DAY, day_shape, read_arrivals
from tasks.scheduler.workload import Metered, Rate, Table, Trace
from tests.tasks.scheduler.values import workload


def test_a_rate_comes_to_its_average_and_its_peak_at_its_hour() -> None:
    rate = Rate(per_second=5, peak=3, peak_at="06:00", rows_per_arrival=2)

    found = read_arrivals(workload(arrivals=rate, horizon_days=2))

    by_hour = found.counts_T.reshape(2, 24, 3600).mean(axis=(0, 2))
    assert 2 * DAY == len(found.counts_T)
    assert 5 == pytest.approx(by_hour.mean(), rel=0.02)
    assert 15 == pytest.approx(by_hour[5:7].mean(), rel=0.1)
    assert found.rows == 2 * found.counts_T.sum()


def test_chance_is_the_same_for_the_same_seed() -> None:
    asked = workload(arrivals=Rate(per_second=1), horizon_days=0.1)

    one, same, other = (read_arrivals(asked, seed=seed).counts_T for seed in (1, 1, 2))

    assert one.tolist() == same.tolist()
    assert one.tolist() != other.tolist()


@pytest.mark.parametrize("peak", [1.0, 1.5, 7.0, 100.0])
def test_the_day_has_the_peak_that_was_asked_for(peak: float) -> None:
    shape = day_shape(peak, "14:00")

    assert peak == pytest.approx(shape.max(), rel=1e-6)
    assert 1 == pytest.approx(shape.mean())


def test_a_shorter_trace_is_repeated_and_a_longer_one_cut_and_both_say_so(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    pl.DataFrame({"n": [1, 2, 3]}).write_csv(path)
    trace = Trace(path=str(path), holds="per-second", rows_per_arrival=4)

    longer = read_arrivals(workload(arrivals=trace, horizon_days=7 / DAY))
    shorter = read_arrivals(workload(arrivals=trace, horizon_days=2 / DAY))

    assert [1, 2, 3, 1, 2, 3, 1] == longer.counts_T.tolist()
    assert ("The trace lasts 3 s; it is repeated 2.333 times to fill 7 s.",) == longer.notes
    assert 4 == longer.rows_per_arrival
    assert [1, 2] == shorter.counts_T.tolist()
    assert ("Of the trace's 3 s, the first 2 s are replayed.",) == shorter.notes


def test_a_single_moment_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "one.csv"
    pl.DataFrame({"at": [17.5]}).write_csv(path)

    found = read_arrivals(workload(arrivals=Trace(path=str(path)), horizon_days=1))

    assert 1 == found.counts_T.sum()
    assert DAY == len(found.counts_T)
    assert "single moment" in found.notes[0]


def test_a_year_is_replayed_for_thirty_days() -> None:
    found = read_arrivals(workload(arrivals=Rate(per_second=0.01), horizon_days=366))

    assert 30 * DAY == len(found.counts_T)


def meter(folder: Path, *lines: tuple[float, str, int, int]) -> None:
    log = MeteringLog(folder)
    for at, endpoint, rows, status in lines:
        log.add(
            Line(
                at_us=round(at * 1e6), endpoint=endpoint, version="1", rows=rows, size=1, status=status, latency_ms=1.0
            )
        )
    log.close()


def test_metered_requests_are_arrivals_but_for_those_that_were_turned_away_as_wrong(tmp_path: Path) -> None:
    meter(
        tmp_path,
        *[(100.0, "toy", 2, 200), (101.2, "toy", 4, 429), (101.5, "other", 9, 200)],
        *[(102.5, "toy", 9, 400), (103.5, "toy", 3, 503)],
    )

    found = read_arrivals(workload(arrivals=Metered(folder=str(tmp_path), endpoint="toy"), horizon_days=5 / DAY))

    assert [1, 1, 0, 1, 0] == found.counts_T.tolist()
    assert 3 == found.rows_per_arrival


def test_an_endpoint_that_was_never_asked_is_named_beside_those_that_were(tmp_path: Path) -> None:
    meter(tmp_path, (100.0, "other", 1, 200))

    with pytest.raises(BadWorkload, match="must hold requests of 'toy', got those of 'other'"):
        read_arrivals(workload(arrivals=Metered(folder=str(tmp_path), endpoint="toy")))
    with pytest.raises(BadWorkload, match="got those of none"):
        read_arrivals(workload(arrivals=Metered(folder=str(tmp_path / "no"), endpoint="toy")))


def test_a_table_has_no_arrivals() -> None:
    with pytest.raises(BadWorkload, match="A table has no arrivals"):
        read_arrivals(workload(consumer=Table(rows=1)))


def test_no_traffic_is_arrivals_too() -> None:
    assert 0 == np.sum(read_arrivals(workload(arrivals=Rate(per_second=0))).counts_T)
