"""What the machines of a workload cost: as it says itself, by the project's dated table, or by AWS at this moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serving.errors import PricesMissing
from tasks.scheduler import price_table
from tasks.scheduler.workload import THIS_MACHINE, Machine, Prices, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """Prices by the kind of machine, and where they are from."""

    prices: Mapping[str, Prices]
    priced_at: str


def find_prices(workload: Workload) -> Priced:
    """Return what every machine of a workload costs. Asks AWS only where the workload says so.

    Raises PricesMissing with what to do where one has no price, or where AWS can't be asked.
    """
    given = {machine.kind: machine.prices for machine in workload.machines if machine.prices is not None}
    asked = [machine.kind for machine in workload.machines if machine.kind not in given]
    if THIS_MACHINE in asked:
        message = (
            f"The machine {THIS_MACHINE!r} must have prices, which nobody can look up, got none. Give them "
            '(machines=[{"prices": {"on_demand": 0.2, "spot": 0.07}}]), or name the instance type that it is, with '
            'speed 1 (machines=[{"kind": "c7i.xlarge", "speed": 1}]).'
        )
        raise PricesMissing(message)
    sources = ["the workload itself"] if given else []
    if asked:
        found, source = _from_aws(workload, asked) if workload.price_source == "aws" else _from_table(workload, asked)
        given |= found
        sources.append(source)
    return Priced(
        prices={machine.kind: given[machine.kind] for machine in workload.machines}, priced_at="; ".join(sources)
    )


def _from_table(workload: Workload, kinds: Sequence[str]) -> tuple[dict[str, Prices], str]:
    missing = [kind for kind in kinds if kind not in price_table.TABLE]
    if missing or workload.region != price_table.REGION:
        message = (
            f"The kinds of machines must be in the project's price table, which is of {price_table.REGION} and knows "
            f"{', '.join(price_table.TABLE)}, got {', '.join(missing or kinds)} in {workload.region}. Give their "
            'prices with the machines, or set price_source to "aws".'
        )
        raise PricesMissing(message)
    return {kind: price_table.TABLE[kind] for kind in kinds}, price_table.SOURCE


def _from_aws(workload: Workload, kinds: Sequence[str]) -> tuple[dict[str, Prices], str]:
    from tasks.scheduler.aws_prices import read_prices  # noqa: PLC0415 - boto3 takes a while to import

    return read_prices(kinds, workload.region)


def machines_priced(machines: Sequence[Machine], priced: Priced) -> list[tuple[Machine, Prices]]:
    """Return each machine with its prices."""
    return [(machine, priced.prices[machine.kind]) for machine in machines]
