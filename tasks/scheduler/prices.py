"""What the machines of a workload cost: as the workload states, by a dated table, or by AWS at this moment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from serving.errors import PricesMissing
from tasks.scheduler.workload import THIS_MACHINE, Prices, Workload

# On-demand prices are those of July 2026. Spot prices are estimates: the savings that AWS's Spot Instance Advisor gave
# in July 2025, taken off the on-demand prices. Linux, shared tenancy, US dollars for an hour.
PRICE_TABLE_REGION = "us-east-1"
PRICE_TABLE_ORIGIN = (
    f"the table of Overnight: AWS {PRICE_TABLE_REGION}, on-demand prices of 2026-07, spot prices estimated from savings"
    " of 2025-07"
)
_USD_PER_HOUR = {
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
PRICE_TABLE: Mapping[str, Prices] = MappingProxyType(
    {kind: Prices(on_demand=on_demand, spot=spot) for kind, (on_demand, spot) in _USD_PER_HOUR.items()}
)

# The pricing API answers for every region, but in few of them; this is one.
_PRICING_REGION = "us-east-1"
_LINUX = ("Linux/UNIX", "Linux/UNIX (Amazon VPC)")
# What is billed by the hour for a plain Linux machine: other products are licences, reservations and idle capacity.
_PLAIN = {
    "operatingSystem": "Linux",
    "preInstalledSw": "NA",
    "tenancy": "Shared",
    "capacitystatus": "Used",
    "marketoption": "OnDemand",
}
_PERMISSIONS = "ec2:DescribeSpotPriceHistory and pricing:GetProducts"


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceQuote:
    """Prices by the kind of machine, and where they are from."""

    prices: Mapping[str, Prices]
    price_origin: str


def find_prices(workload: Workload) -> PriceQuote:
    """Return what every machine of a workload costs. Asks AWS only where the workload says so.

    Raises PricesMissing with what to do where a machine has no price, or where AWS can't be asked.
    """
    prices = {machine.kind: machine.prices for machine in workload.machines if machine.prices is not None}
    missing = [machine.kind for machine in workload.machines if machine.kind not in prices]
    if THIS_MACHINE in missing:
        message = (
            f"The machine {THIS_MACHINE!r} must have prices, which nobody can look up, got none. Give them "
            '(machines=[{"prices": {"on_demand": 0.2, "spot": 0.07}}]), or name the instance type that it is, with '
            'speed 1 (machines=[{"kind": "c7i.xlarge", "speed": 1}]).'
        )
        raise PricesMissing(message)
    origins = ["the workload itself"] if prices else []
    if missing:
        if workload.price_source == "aws":
            found, origin = read_aws_prices(missing, workload.region)
        else:
            found, origin = _look_up_prices(workload, missing), PRICE_TABLE_ORIGIN
        prices |= found
        origins.append(origin)
    return PriceQuote(
        prices={machine.kind: prices[machine.kind] for machine in workload.machines}, price_origin="; ".join(origins)
    )


def _look_up_prices(workload: Workload, kinds: Sequence[str]) -> dict[str, Prices]:
    unknown = [kind for kind in kinds if kind not in PRICE_TABLE]
    if unknown or workload.region != PRICE_TABLE_REGION:
        message = (
            f"The kinds of machines must be in the project's price table, which is of {PRICE_TABLE_REGION} and knows "
            f"{', '.join(PRICE_TABLE)}, got {', '.join(unknown or kinds)} in {workload.region}. Give their "
            'prices with the machines, or set price_source to "aws".'
        )
        raise PricesMissing(message)
    return {kind: PRICE_TABLE[kind] for kind in kinds}


def read_aws_prices(kinds: Sequence[str], region: str) -> tuple[dict[str, Prices], str]:
    """Return what instance types cost in a region now, and where that is from.

    On-demand prices are those of the pricing API, spot prices those of EC2's price history in the cheapest zone, left
    out where AWS sells none. Credentials are those that boto3 finds. Raises PricesMissing where AWS does not know
    the region or an instance type, and where it does not answer.
    """
    # boto3 takes a while to import, and few workloads need it.
    import boto3  # noqa: PLC0415
    from botocore.config import Config  # noqa: PLC0415
    from botocore.exceptions import (  # noqa: PLC0415
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    session = boto3.Session()
    known = session.get_available_regions("ec2")
    if region not in known:
        message = (
            f"The region must be one that AWS has, {', '.join(known)}, got {region!r}. A newer one needs a newer boto3."
        )
        raise PricesMissing(message)
    now = datetime.now(UTC)
    config = Config(connect_timeout=5, read_timeout=20, retries={"mode": "standard", "total_max_attempts": 3})
    try:
        spot = _read_spot_prices(session.client("ec2", region_name=region, config=config), kinds, now)
        pricing = session.client("pricing", region_name=_PRICING_REGION, config=config)
        on_demand = {kind: _read_on_demand_price(pricing, kind, region) for kind in kinds}
    except (NoCredentialsError, PartialCredentialsError) as error:
        message = (
            f"AWS must be given credentials to be asked for prices, got: {error}. Set AWS_PROFILE or AWS_ACCESS_KEY_ID "
            f"and AWS_SECRET_ACCESS_KEY (they need {_PERMISSIONS}), or give the prices with the machines."
        )
        raise PricesMissing(message) from None
    except (BotoCoreError, ClientError) as error:
        message = (
            f"AWS must answer for the prices of {', '.join(kinds)} in {region}, got: {error}. The credentials need "
            f"{_PERMISSIONS}. Correct that, or give the prices with the machines."
        )
        raise PricesMissing(message) from None
    prices = {kind: Prices(on_demand=on_demand[kind], spot=spot.get(kind)) for kind in kinds}
    return prices, f"AWS {region}, {now:%Y-%m-%d %H:%M} UTC, spot of the cheapest zone"


def _read_spot_prices(ec2: Any, kinds: Sequence[str], now: datetime) -> dict[str, float]:
    """Return the price of the cheapest zone by kind; in each zone the last price counts."""
    last: dict[tuple[str, str], tuple[datetime, float]] = {}
    pages = ec2.get_paginator("describe_spot_price_history").paginate(
        InstanceTypes=list(kinds), ProductDescriptions=list(_LINUX), StartTime=now
    )
    for entry in (entry for page in pages for entry in page["SpotPriceHistory"]):
        place = entry["InstanceType"], entry["AvailabilityZone"]
        price = entry["Timestamp"], float(entry["SpotPrice"])
        last[place] = max(last.get(place, price), price)
    cheapest: dict[str, float] = {}
    for (kind, _), (_, usd) in last.items():
        cheapest[kind] = min(cheapest.get(kind, usd), usd)
    return cheapest


def _read_on_demand_price(pricing: Any, kind: str, region: str) -> float:
    values = {**_PLAIN, "instanceType": kind, "regionCode": region}
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in values.items()]
    pages = pricing.get_paginator("get_products").paginate(ServiceCode="AmazonEC2", Filters=filters)
    found = {usd for page in pages for product in page["PriceList"] for usd in _list_hourly_prices(json.loads(product))}
    if not found:
        message = (
            f"An instance type must be one that AWS sells in the region, but it lists no price of {kind!r} in {region} "
            "(Linux, shared tenancy). Check its name, take another region, or give its prices with the machine."
        )
        raise PricesMissing(message)
    # Where AWS lists several, the machine must not look cheaper than the bill.
    return max(found)


def _list_hourly_prices(product: Mapping[str, Any]) -> Iterator[float]:
    """Yield the prices of an hour that a product of the price list has."""
    for term in product.get("terms", {}).get("OnDemand", {}).values():
        for dimension in term["priceDimensions"].values():
            usd = float(dimension["pricePerUnit"].get("USD", 0.0))
            if dimension["unit"] == "Hrs" and usd > 0:
                yield usd


def format_usd(amount: float) -> str:
    """Return an amount in US dollars: without cents from a thousand on, and to three digits below a dollar."""
    if amount >= 1000:  # noqa: PLR2004
        return f"${amount:,.0f}"
    return f"${amount:,.2f}" if amount >= 1 else f"${amount:.3g}"
