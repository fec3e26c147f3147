"""Dashboards and alerts ask for metrics that the processes really expose, by labels that these have."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from infra.local.gateway import gateway_server
from serving.gateway.client import GatewayClient
from tasks.common.metrics import RunMetrics, RunRecorder
from tasks.stream.prometheus import StreamCollector
from tasks.stream.report import StreamMetrics
from tests.serving.gateway.support import EndpointClient, read_metrics, route, v2_server
from tests.tasks.stream.messages import json_row, score

ROOT = Path(__file__).parents[2]
BOARDS = sorted((ROOT / "infra/grafana").glob("*.json"))
ALERTS = ROOT / "infra/prometheus/alerts.yaml"
# What Prometheus adds to each target that it scrapes.
TARGET_LABELS = {"instance", "job"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """A metric that a query asks for, and the labels that it is chosen by."""

    name: str
    labels: frozenset[str]


def find_selectors(query: str) -> list[Selector]:
    """Return the metrics that a query asks for. Raises ValueError for what is no PromQL."""
    return list(iter_selectors(promql_parser.parse(query)))


def iter_selectors(expression: Any) -> Iterator[Selector]:
    """Yield the selectors below an expression."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield Selector(name=expression.name, labels=frozenset(each.name for each in expression.matchers.matchers))
        return
    children = ("expr", "lhs", "rhs", "param", "vector_selector")
    for child in (getattr(expression, name, None) for name in children):
        if isinstance(child, promql_parser.Expr):
            yield from iter_selectors(child)
    for argument in getattr(expression, "args", None) or ():
        yield from iter_selectors(argument)


def find_grouping(query: str) -> set[str]:
    """Return the labels that a query groups by."""
    return set(iter_grouping(promql_parser.parse(query)))


def iter_grouping(expression: Any) -> Iterator[str]:
    """Yield the labels of every `by` and `on` below an expression."""
    modifier = getattr(expression, "modifier", None)
    yield from getattr(modifier, "labels", None) or ()
    for name in ("expr", "lhs", "rhs", "param"):
        if isinstance(child := getattr(expression, name, None), promql_parser.Expr):
            yield from iter_grouping(child)
    for argument in getattr(expression, "args", None) or ():
        yield from iter_grouping(argument)


def read_page(page: str) -> dict[str, set[str]]:
    """Return the names of the samples that a page of metrics has or may have, with the labels of each."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        for suffix in suffixes.get(family.type, ("",)):
            found.setdefault(f"{family.name}{suffix}", set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def render_runs() -> str:
    """Return the page of a process that has scored a run and a night, with every series that there can be."""
    metrics = RunMetrics()
    recorder = RunRecorder("churn", "s3://lake/scores", metrics)
    recorder.begin(model="churn", version="3", destination="s3://lake/scores", rows=4, chunks=2)
    recorder.note_step("score", 1.0)
    recorder.note_progress(2, 1)
    recorder.note_scored(
        rows=2, rejects=1, chunks=1, chunks_dropped=1, parts=1, bytes_read=9, bytes_written=9, seconds={"read": 1.0}
    )
    recorder.note_interruption("SIGTERM", 2.0)
    recorder.note_deadline(1_800_000_000)
    recorder.note_night(
        margin_seconds=60, machine_seconds={"spot": 60}, cost=0.1, cost_on_demand=0.3, moves=["on-demand"]
    )
    recorder.finish("complete", 0.07)
    return generate_latest(metrics.registry).decode()


def render_stream() -> str:
    """Return the page of a stream that has scored a message."""
    metrics = StreamMetrics(lag=lambda: 7)
    metrics.count_emitted([score([json_row(1)])], 1, 0.5, 10.0)
    registry = CollectorRegistry()
    registry.register(StreamCollector(metrics))
    return generate_latest(registry).decode()


@pytest.fixture(scope="module")
def gateway_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a real gateway whose endpoint has answered, and been refused."""
    folder = tmp_path_factory.mktemp("monitoring")
    server = v2_server(folder)
    try:
        with gateway_server(folder / "gateway") as gateway, GatewayClient(gateway.url, gateway.admin_key) as admin:
            admin.put("churn", route(server.url))
            endpoint = EndpointClient("churn", gateway.url)
            endpoint.score()
            endpoint.http.close()
            return read_metrics(gateway)
    finally:
        server.process.stop()


@pytest.fixture(scope="module")
def exposed(gateway_page: str) -> dict[str, set[str]]:
    """The samples of every kind of process, with their labels."""
    return read_page(render_runs()) | read_page(render_stream()) | read_page(gateway_page)


def list_queries() -> list[tuple[str, str]]:
    """Return every query of the dashboards and alerts, with what it is for."""
    boards = ((path, json.loads(path.read_text())) for path in BOARDS)
    queries = [
        (f"{path.stem}: {panel['title']}", target["expr"])
        for path, board in boards
        for panel in board["panels"]
        for target in panel["targets"]
    ]
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return queries + [(rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]


QUERIES = list_queries()


@pytest.mark.parametrize("query", [query for _, query in QUERIES], ids=[name for name, _ in QUERIES])
def test_every_query_asks_for_metrics_that_exist_by_labels_that_they_have(
    query: str, exposed: dict[str, set[str]]
) -> None:
    selectors = find_selectors(query)
    names = {selector.name for selector in selectors}

    assert selectors
    assert set() == names - exposed.keys()
    for selector in selectors:
        # Of a counter that nothing was counted of yet no label is known.
        if labels := exposed[selector.name]:
            assert set() == selector.labels - labels - TARGET_LABELS
    known = set().union(*(exposed[name] for name in names))
    if all(exposed[name] for name in names):
        assert set() == find_grouping(query) - known - TARGET_LABELS


def test_a_query_of_a_metric_that_does_not_exist_is_found_wherever_it_stands() -> None:
    query = 'sum by (le) (rate(a_total{x="1"}[5m])) / on (le) (b or -c) > bool quantile(0.9, d offset 1h)'

    assert ["a_total", "b", "c", "d"] == [selector.name for selector in find_selectors(query)]
    assert frozenset({"x"}) == find_selectors(query)[0].labels
    assert {"le"} == find_grouping(query)
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        find_selectors("sum by (rate(a_total[5m])")


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_a_dashboard_has_few_panels_each_with_a_unit_and_a_title_that_says_what_it_shows(path: Path) -> None:
    board = json.loads(path.read_text())
    panels = board["panels"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]

    assert f"overnight-{path.stem}" == board["uid"]
    assert 4 <= len(panels) <= 8
    assert len(panels) == len({panel["id"] for panel in panels}) == len(set(places))
    for panel in panels:
        assert panel["title"].split()[0] in ("How", "What", "Where", "Which")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert all(target["legendFormat"] for target in panel["targets"])
        assert {"type": "prometheus", "uid": "${datasource}"} == panel["datasource"]
    assert ["datasource"] == [variable["name"] for variable in board["templating"]["list"]]


def test_there_are_ten_alerts_and_each_says_what_to_do_on_a_page_that_exists() -> None:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]

    assert 10 == len({rule["alert"] for rule in rules})
    for rule in rules:
        page, _, anchor = rule["annotations"]["page"].partition("#")
        headings = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("#")]
        assert {"summary", "action", "page"} == set(rule["annotations"])
        assert not anchor or anchor in {line.lstrip("# ").lower().replace(" ", "-") for line in headings}


def test_the_alerts_fire_when_they_must_and_only_then(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is missing: apt-get install promtool")
    tests = tmp_path / "alerts_test.yaml"
    text = (Path(__file__).parent / "prometheus/alerts_test.yaml").read_text()
    tests.write_text(text.replace("[ALERTS]", f"[{json.dumps(str(ALERTS))}]"))
    for arguments in (["check", "rules", str(ALERTS)], ["test", "rules", str(tests)]):
        done = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=60, check=False)
        assert 0 == done.returncode, done.stdout + done.stderr


@pytest.mark.machines
def test_a_real_prometheus_answers_every_query(gateway_page: str, tmp_path: Path) -> None:
    """Scraped from a port as it is, and asked as Grafana does."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is missing: apt-get install prometheus")
    from tests.infra.prometheus.server import prometheus_server

    pages = [render_runs(), render_stream(), gateway_page]
    with prometheus_server(Path(program), pages, ALERTS, tmp_path) as url:
        answers = {
            name: httpx.get(f"{url}/api/v1/query", params={"query": query}, timeout=30).json()
            for name, query in QUERIES
        }
        rules = httpx.get(f"{url}/api/v1/rules", timeout=30).json()["data"]["groups"]
        scraped = httpx.get(f"{url}/api/v1/label/__name__/values", timeout=30).json()["data"]

    assert {"success"} == {answer["status"] for answer in answers.values()}
    assert {"ok"} == {rule["health"] for group in rules for rule in group["rules"]} - {"unknown"}
    assert {"overnight_run_rows_scored_total", "overnight_requests_total"} <= set(scraped)
    # These need no rate over time.
    for name in ("runs: How much of each run is done", "endpoints: Which endpoints have their models loaded"):
        assert answers[name]["data"]["result"], name
