"""Live prices: EC2's history is moto's HTTP server; the pricing API, which moto lacks, is a server of these tests."""

from __future__ import annotations

import json
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from serving.errors import PricesMissing
from tasks.scheduler.prices import find_prices, format_usd
from tasks.scheduler.workload import Machine, Prices, Table, Workload
from tests.servers import serve_http

GIVEN = Prices(on_demand=0.2, spot=0.07)


def workload(*machines: Machine, **changes: Any) -> Workload:
    return Workload(
        name="nightly", model="models:/churn@champion", consumer=Table(rows=10), machines=machines, **changes
    )


def test_prices_that_the_workload_gives_go_before_the_table() -> None:
    priced = find_prices(workload(Machine(prices=GIVEN), Machine(kind="c7i.large", speed=1, prices=GIVEN)))

    assert {"this": GIVEN, "c7i.large": GIVEN} == priced.prices
    assert "the workload itself" == priced.price_origin


def test_prices_of_the_table_come_with_their_region_and_date() -> None:
    priced = find_prices(workload(Machine(prices=GIVEN), Machine(kind="c7i.xlarge", speed=2)))

    assert Prices(on_demand=0.1785, spot=0.0696) == priced.prices["c7i.xlarge"]
    assert (
        "the workload itself; the table of Overnight: AWS us-east-1, on-demand prices of 2026-07" in priced.price_origin
    )
    assert "estimated from savings of 2025-07" in priced.price_origin


def test_this_machine_must_have_prices_or_be_named() -> None:
    with pytest.raises(PricesMissing, match=r"'this' must have prices.*or name the instance type that it is"):
        find_prices(workload(Machine()))


@pytest.mark.parametrize(("kind", "region"), [("x99.huge", "us-east-1"), ("c7i.xlarge", "eu-west-1")])
def test_a_kind_or_a_region_that_the_table_does_not_know_is_named(kind: str, region: str) -> None:
    with pytest.raises(PricesMissing, match=rf"which is of us-east-1 and knows .*got {kind} in {region}.*price_source"):
        find_prices(workload(Machine(kind=kind, speed=1), region=region))


ON_DEMAND = {"c7i.large": [0.08925], "m7i.large": [0.1008, 0.0999]}


def product(usd: float) -> str:
    """A product as the price list has it, with a dimension that costs nothing and a reservation beside it."""
    hourly = {"unit": "Hrs", "pricePerUnit": {"USD": f"{usd:.10f}"}}
    once = {"unit": "Quantity", "pricePerUnit": {"USD": "99.0"}}
    free = {"unit": "Hrs", "pricePerUnit": {"USD": "0.0000000000"}}
    terms = {"A.B": {"priceDimensions": {"A.B.C": hourly, "A.B.D": once, "A.B.E": free}}}
    reserved = {"R": {"priceDimensions": {"R.1": {"unit": "Hrs", "pricePerUnit": {"USD": "5.0"}}}}}
    return json.dumps({"product": {}, "terms": {"OnDemand": terms, "Reserved": reserved}})


class PriceList(BaseHTTPRequestHandler):
    """GetProducts of the pricing API, one product a page."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        filters = {each["Field"]: each["Value"] for each in asked["Filters"]}
        assert {"operatingSystem": "Linux", "tenancy": "Shared"}.items() <= filters.items()
        found = ON_DEMAND.get(filters["instanceType"], [])
        at = int(asked.get("NextToken", "0"))
        answer: dict[str, Any] = {"FormatVersion": "aws_v1", "PriceList": [product(usd) for usd in found[at : at + 1]]}
        if at + 1 < len(found):
            answer["NextToken"] = str(at + 1)
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-amz-json-1.1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def price_list() -> Generator[str]:
    """The address of a server of the pricing API."""
    with serve_http(PriceList) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def ec2() -> Generator[str]:
    """The address of moto's server, which knows the price history of EC2: the same price for all."""
    server_module = pytest.importorskip("moto.server", reason="pip install -e '.[dev]' brings moto")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def aws(ec2: str, price_list: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of them in AWS's place, and credentials that anybody may have."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_EC2", ec2)
    monkeypatch.setenv("AWS_ENDPOINT_URL_PRICING", price_list)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")


def live(*kinds: str, region: str = "us-east-1") -> Workload:
    return workload(*(Machine(kind=kind, speed=1) for kind in kinds), price_source="aws", region=region)


@pytest.mark.usefixtures("aws")
def test_prices_are_those_of_the_cheapest_zone_and_the_highest_of_several_listings() -> None:
    priced = find_prices(live("c7i.large", "m7i.large"))

    assert {
        "c7i.large": Prices(on_demand=0.08925, spot=0.00001),
        "m7i.large": Prices(on_demand=0.1008, spot=0.00001),
    } == (priced.prices)
    assert priced.price_origin.startswith("AWS us-east-1, 20")


@pytest.mark.usefixtures("aws")
def test_a_kind_that_aws_does_not_sell_is_named() -> None:
    with pytest.raises(PricesMissing, match=r"lists no price of 'x99\.huge' in us-east-1"):
        find_prices(live("x99.huge"))


@pytest.mark.usefixtures("aws")
def test_an_unknown_region_is_named_with_the_known_ones() -> None:
    with pytest.raises(PricesMissing, match=r"eu-west-1.*got 'mx-north-9'"):
        find_prices(live("c7i.large", region="mx-north-9"))


@pytest.mark.usefixtures("aws")
def test_missing_credentials_are_an_error_with_the_permissions_that_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(PricesMissing, match=r"must be given credentials.*pricing:GetProducts"):
        find_prices(live("c7i.large"))


@pytest.mark.usefixtures("aws")
def test_a_server_that_does_not_answer_is_an_error_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_EC2", "http://127.0.0.1:9")
    with pytest.raises(PricesMissing, match=r"AWS must answer for the prices of c7i.large.*127.0.0.1:9"):
        find_prices(live("c7i.large"))


@pytest.mark.parametrize(("amount", "words"), [(0, "$0"), (0.0123, "$0.0123"), (12.3, "$12.30"), (12345.6, "$12,346")])
def test_dollars_are_formatted_by_their_size(amount: float, words: str) -> None:
    assert words == format_usd(amount)
