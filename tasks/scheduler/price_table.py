"""A small dated table of what common machines of AWS cost, for a first answer without an account.

On-demand prices are those of July 2026. Spot prices are no quotes: the savings that AWS's Spot Instance Advisor told in
July 2025, taken off the on-demand prices. Linux, shared tenancy, US dollars for an hour. Prices that matter are given
with the workload, or read live.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tasks.scheduler.workload import Prices

REGION = "us-east-1"
SOURCE = (
    f"the table of Overnight: AWS {REGION}, on-demand prices of 2026-07, spot prices estimated from savings of 2025-07"
)

_USD_AN_HOUR = {
    # Cores that share their cycles, then general purpose, then compute, then Graviton.
    "t3.medium": (0.0416, 0.0183),
    "m5.large": (0.096, 0.0326),
    "m5.xlarge": (0.192, 0.0653),
    "m6i.large": (0.096, 0.0355),
    "m6i.xlarge": (0.192, 0.0864),
    "m7i.large": (0.1008, 0.0323),
    "m7i.xlarge": (0.2016, 0.0948),
    "m7i.2xlarge": (0.4032, 0.1532),
    "c5.xlarge": (0.17, 0.0748),
    "c6i.xlarge": (0.17, 0.068),
    "c7i.large": (0.08925, 0.0303),
    "c7i.xlarge": (0.1785, 0.0696),
    "c7i.2xlarge": (0.357, 0.1464),
    "c7i.4xlarge": (0.714, 0.2785),
    "c7g.xlarge": (0.145, 0.0551),
    "c7g.2xlarge": (0.29, 0.0899),
    "m7g.xlarge": (0.1632, 0.062),
    # One GPU each, but for the last, which has eight.
    "g4dn.xlarge": (0.526, 0.1894),
    "g5.xlarge": (1.006, 0.4125),
    "g6.xlarge": (0.8048, 0.4104),
    "g6e.xlarge": (1.861, 0.7816),
    "p5.48xlarge": (55.04, 26.4192),
}

TABLE: Mapping[str, Prices] = MappingProxyType(
    {kind: Prices(on_demand=on_demand, spot=spot) for kind, (on_demand, spot) in _USD_AN_HOUR.items()}
)
