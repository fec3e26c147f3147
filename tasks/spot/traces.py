"""Traces of spot availability that resemble real ones, for replays where there are none.

As in the traces of "Can't Be Late" (Wu et al., NSDI 2024), each trace has a temper of its own, from spot that is hardly
ever up to spot that is hardly ever gone; most gaps are over after a tick or two and a few last for hours; and a spell
that has lasted a while is likely to last. Spells are of two kinds, short and long, with geometric lengths.

Shapes: N traces, T ticks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SHORT_TICKS = 1.5
_SHORT_SHARE_UP, _SHORT_SHARE_DOWN = 0.4, 0.65
_LONG_TICKS_UP, _LONG_TICKS_DOWN = 20.0, 15.0
# By how many times the long spells of one trace differ from those of another, one standard deviation apart.
_TEMPER = 2.5


def synthetic_traces(count: int, ticks: int, *, seed: int) -> NDArray[np.bool_]:
    """Return count traces of whether spot is up in each tick; the same for the same seed."""
    random = np.random.default_rng(seed)
    return np.array([_trace(ticks, random) for _ in range(count)]).reshape(count, ticks)


def _trace(ticks: int, random: np.random.Generator) -> NDArray[np.bool_]:
    temper = _TEMPER ** random.standard_normal()
    means = {True: _LONG_TICKS_UP * temper, False: _LONG_TICKS_DOWN / temper}
    shares = {True: _SHORT_SHARE_UP, False: _SHORT_SHARE_DOWN}
    # It begins somewhere within its course.
    skip = int(random.integers(ticks + 1))
    up, spells, length = bool(random.integers(2)), [], 0
    while length < skip + ticks:
        mean = _SHORT_TICKS if random.random() < shares[up] else max(means[up], 1.0)
        spells.append(np.full(int(random.geometric(1 / mean)), up))
        length += len(spells[-1])
        up = not up
    return np.concatenate(spells)[skip : skip + ticks]
