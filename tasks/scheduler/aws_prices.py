"""Prices of AWS at this moment: on-demand by the pricing API, spot by the price history of EC2."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from serving.errors import PricesMissing
from tasks.scheduler.workload import Prices

# The pricing API answers for every region, but in few of them; this is one.
_PRICING_REGION = "us-east-1"
_TIMES = Config(connect_timeout=5, read_timeout=20, retries={"mode": "standard", "total_max_attempts": 3})
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


def read_prices(kinds: Sequence[str], region: str) -> tuple[dict[str, Prices], str]:
    """Return what instance types cost in a region now, and the source in words.

    Spot is that of the cheapest zone, and left out where AWS sells none. Credentials are those that boto3 finds. Raises
    PricesMissing where a region or an instance type is none that AWS knows, and where AWS does not answer.
    """
    session = boto3.Session()
    known = session.get_available_regions("ec2")
    if region not in known:
        message = (
            f"The region must be one that AWS has, {', '.join(known)}, got {region!r}. A newer one needs a newer boto3."
        )
        raise PricesMissing(message)
    now = datetime.now(UTC)
    try:
        spot = _spot(session.client("ec2", region_name=region, config=_TIMES), kinds, now)
        pricing = session.client("pricing", region_name=_PRICING_REGION, config=_TIMES)
        on_demand = {kind: _on_demand(pricing, kind, region) for kind in kinds}
    except (NoCredentialsError, PartialCredentialsError) as error:
        message = (
            f"AWS must be given credentials to be asked for prices, got: {error}. Set AWS_PROFILE or AWS_ACCESS_KEY_ID "
            f"and AWS_SECRET_ACCESS_KEY (they need {_PERMISSIONS}), or give the prices with the machines."
        )
        raise PricesMissing(message) from None
    except (BotoCoreError, ClientError) as error:
        message = (
            f"AWS must answer for the prices of {', '.join(kinds)} in {region}, got: {error}. The credentials need "
            f"{_PERMISSIONS}. Mend that, or give the prices with the machines."
        )
        raise PricesMissing(message) from None
    prices = {kind: Prices(on_demand=on_demand[kind], spot=spot.get(kind)) for kind in kinds}
    return prices, f"AWS {region}, {now:%Y-%m-%d %H:%M} UTC, spot of the cheapest zone"


def _spot(ec2: Any, kinds: Sequence[str], now: datetime) -> dict[str, float]:
    """Return the price of the cheapest zone by kind: in each zone the last one counts."""
    last: dict[tuple[str, str], tuple[datetime, float]] = {}
    pages = ec2.get_paginator("describe_spot_price_history").paginate(
        InstanceTypes=list(kinds), ProductDescriptions=list(_LINUX), StartTime=now
    )
    for entry in (entry for page in pages for entry in page["SpotPriceHistory"]):
        at = entry["InstanceType"], entry["AvailabilityZone"]
        told = entry["Timestamp"], float(entry["SpotPrice"])
        last[at] = max(last.get(at, told), told)
    cheapest: dict[str, float] = {}
    for (kind, _), (_, usd) in last.items():
        cheapest[kind] = min(cheapest.get(kind, usd), usd)
    return cheapest


def _on_demand(pricing: Any, kind: str, region: str) -> float:
    wanted = {**_PLAIN, "instanceType": kind, "regionCode": region}
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()]
    pages = pricing.get_paginator("get_products").paginate(ServiceCode="AmazonEC2", Filters=filters)
    found = {usd for page in pages for product in page["PriceList"] for usd in _hourly(json.loads(product))}
    if not found:
        message = (
            f"An instance type must be one that AWS sells in the region, but it lists no price of {kind!r} in {region} "
            "(Linux, shared tenancy). Check its name, take another region, or give its prices with the machine."
        )
        raise PricesMissing(message)
    # Should AWS list several, the machine must not look cheaper than the bill.
    return max(found)


def _hourly(product: Mapping[str, Any]) -> Iterator[float]:
    """Return the prices of an hour that a product of the price list has."""
    for term in product.get("terms", {}).get("OnDemand", {}).values():
        for dimension in term["priceDimensions"].values():
            usd = float(dimension["pricePerUnit"].get("USD", 0.0))
            if dimension["unit"] == "Hrs" and usd > 0:
                yield usd
