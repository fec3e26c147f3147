from __future__ import annotations

import numpy as np

from tasks.spot.traces import synthetic_traces

TRACES = synthetic_traces(200, 554, seed=1)


def test_traces_are_the_same_for_the_same_seed_only() -> None:
    assert (TRACES == synthetic_traces(200, 554, seed=1)).all()
    assert (TRACES != synthetic_traces(200, 554, seed=2)).any()


def test_traces_are_of_every_temper() -> None:
    shares = TRACES.mean(axis=1)

    assert (200, 554) == TRACES.shape
    assert shares.min() < 0.2
    assert shares.max() > 0.9


def test_most_gaps_are_short_and_some_last_for_hours() -> None:
    gaps = np.concatenate([_gaps(trace) for trace in TRACES])

    assert np.median(gaps) <= 2
    assert (gaps >= 18).mean() > 0.05


def test_there_may_be_no_traces() -> None:
    assert (0, 10) == synthetic_traces(0, 10, seed=0).shape


def _gaps(trace: np.ndarray) -> np.ndarray:
    edges = np.flatnonzero(np.diff(np.concatenate([[True], trace, [True]]).astype(int)))
    return edges[1::2] - edges[::2]
