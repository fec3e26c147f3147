"""An endpoint's life on real servers: Prefect, Triton and the gateway."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Generator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from deployments.demo.endpoint import Callers
from deployments.demo.endpoint_faulty import LATE_MINUTES
from infra.local.gateway import GatewayServer, gateway_server
from infra.local.prefect_server import PrefectServer
from infra.local.triton import TritonServer
from serving.errors import BadInput, BudgetBroken, EndpointFailed, LatencyImpossible, RolledBack, VerifyFailed
from serving.gateway.client import GatewayClient
from serving.model.registry import resolve_model
from serving.protocol.oip import encode_request
from tasks.common.events import ENDPOINT_CHANGED
from tasks.endpoint.spec import Canary, EndpointSpec, Shadow
from tasks.endpoint.targets import External, RayServe, Triton
from tests.eventually import eventually
from tests.graphs import PutGraph, graph_of, raw_rows, register_chain, register_prep, register_step, tensor
from tests.prefect_events import find_events
from tests.serving.targets.triton_models import list_instances

if TYPE_CHECKING:
    from tasks.endpoint.report import Endpoint

KEY, VARIABLE = "a-key-of-the-tests-0123456789abcdef", "CHURN_API_KEY"
FEATURES = ("late", "b", "c")
CANARY = Canary(percent=50, requests_min=20, error_rate_max=0.01, seconds_max=60)
# More than the gateway holds a request for a load, and then for its answer.
ANSWER_SECONDS_MAX = 120
UNASKED = CANARY.model_copy(update={"seconds_max": 0.5})
Put = Callable[..., "Endpoint"]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Generator[GatewayServer]:
    with gateway_server(tmp_path_factory.mktemp("gateway")) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OVERNIGHT_ADMIN_KEY", server.admin_key)
        patch.setenv(VARIABLE, KEY)
        yield server


@pytest.fixture(scope="module")
def client(gateway: GatewayServer) -> Generator[GatewayClient]:
    with GatewayClient(gateway.url, gateway.admin_key) as client:
        yield client


@pytest.fixture(scope="module")
def network(registry: Path) -> str:
    """A real network, with an example."""
    import torch

    from tests.support import register_torch

    torch.manual_seed(1)
    layers = (torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    return register_torch("endpoint-network", torch.nn.Sequential(*layers), FEATURES, np.zeros((2, 3), np.float32))


@pytest.fixture(scope="module")
def versions(registry: Path) -> dict[str, str]:
    """Versions of one model, of code, which loads faster than a network: two good ones, and two with a fault.

    One of those answers differently each time, and one fails on some rows.
    """
    from deployments.demo.endpoint_versions import register_faulty

    faults = {"first": "", "second": "", "moody": "moody", "delicate": "delicate"}
    numbers = {name: register_faulty(fault, "endpoint-churn", "x", FEATURES, "score") for name, fault in faults.items()}
    return {name: f"models:/endpoint-churn/{number}" for name, number in numbers.items()}


@pytest.fixture(scope="module")
def put(prefect: PrefectServer, triton: TritonServer, gateway: GatewayServer) -> Put:
    """Run the flow for an endpoint on these servers."""
    from flows.endpoint import online_endpoint

    def run(name: str, model: str | None, **changes: Any) -> Endpoint:
        given = {
            "name": name,
            "model": model,
            "gateway": gateway.url,
            "target": target(triton),
            "access": {"environment": [VARIABLE]},
        }
        return online_endpoint(EndpointSpec.model_validate({**given, **changes}))

    return run


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployedEndpoint:
    """The endpoint that tests share, at the first or the second version, and leave at one of them."""

    now: str
    other: str
    name: str = "churn"

    @property
    def version(self) -> str:
        return self.now.rpartition("/")[2]

    @property
    def other_version(self) -> str:
        return self.other.rpartition("/")[2]


@pytest.fixture
def churn(client: GatewayClient, versions: dict[str, str], put: Put) -> DeployedEndpoint:
    if client.get("churn") is None:
        put("churn", versions["first"])
    state = client.get("churn")
    assert state is not None
    (served,) = state.route.versions
    models = versions["first"], versions["second"]
    now, other = models if models[0].endswith(f"/{served.version}") else models[::-1]
    return DeployedEndpoint(now=now, other=other)


def target(triton: TritonServer) -> Triton:
    return Triton(repository=str(triton.repository), url=triton.url, grpc=triton.grpc)


def loaded(triton: TritonServer, name: str) -> list[str]:
    """The versions of a model that Triton has loaded."""
    listed = httpx.post(f"{triton.url}/v2/repository/index", json={"ready": True}).json()
    return sorted(each["version"] for each in listed if each["name"] == name)


def body(model: str, x_NF: np.ndarray) -> bytes:
    return encode_request(resolve_model(model).contract({}, {}), {"x": x_NF.astype(np.float32)}).content


def score(gateway: GatewayServer, name: str, x_NF: np.ndarray, model: str, key: str = KEY) -> dict[str, Any]:
    url = f"{gateway.url}/v2/models/{name}/infer"
    headers = {"Authorization": f"Bearer {key}"}
    answer = httpx.post(url, content=body(model, x_NF), headers=headers, timeout=ANSWER_SECONDS_MAX)
    return {"status": answer.status_code, **answer.json()}


def calling(gateway: GatewayServer, name: str, model: str, rate: float = 50) -> Callers:
    """Callers of an endpoint, one in five of which ask for a row that the delicate version fails on."""
    rows = np.random.default_rng(4).standard_normal((50, 3))
    rows[::5, 0] = 2 * LATE_MINUTES
    url = f"{gateway.url}/v2/models/{name}/infer"
    bodies = [body(model, row[None]) for row in rows]
    return Callers(url=url, bodies=bodies, rate=rate, headers={"Authorization": f"Bearer {KEY}"})


def artifacts(prefect: PrefectServer, key: str) -> list[dict[str, Any]]:
    wanted = {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC"}
    found: list[dict[str, Any]] = httpx.post(f"{prefect.api_url}/artifacts/filter", json=wanted).json()
    return found


@pytest.mark.whole
def test_a_model_goes_online_with_batching_verified_measured_and_reported(
    prefect: PrefectServer, triton: TritonServer, gateway: GatewayServer, network: str, put: Put
) -> None:
    from flows.endpoint import retire_endpoint

    budget = {"latency_ms": 1000, "rate": 50, "callers": 8}
    endpoint = put("online", network, budget=budget, measure_seconds=0.5)
    answer = score(gateway, "online", np.ones((2, 3)), network)

    assert (200, "1") == (answer["status"], answer["model_version"])
    assert 1 <= endpoint.batching.batch_size_max <= 4
    assert 0 == endpoint.batching.wait_ms_max
    assert endpoint.verification.rows_example == 2
    assert endpoint.verification.rows_random == 32
    assert endpoint.checked is not None
    assert endpoint.checked.is_kept
    assert [25, 50] == [each.requests for each in (endpoint.checked.steady, endpoint.checked.burst) if each]
    assert endpoint.summary in artifacts(prefect, "endpoint-report")[0]["data"]
    assert artifacts(prefect, "endpoint-plot")[0]["data"].startswith("data:image/png")
    assert KEY not in endpoint.model_dump_json()

    again = put("online", network, budget=budget, measure_seconds=0.5)

    assert again.checked is None  # nothing was deployed: the release is up already
    assert endpoint.batching == again.batching
    assert ("1",) == retire_endpoint("online", gateway=gateway.url)

    made, retired = find_events(prefect, ENDPOINT_CHANGED, "overnight.endpoint.online", count=2)
    assert (network, "1", []) == tuple(made["payload"][name] for name in ("model", "version", "removed"))
    assert (None, ["1"]) == (retired["payload"]["version"], retired["payload"]["removed"])
    assert {"model", "flow-run"} <= {each["prefect.resource.role"] for each in made["related"]}


def test_a_request_without_a_key_is_refused(gateway: GatewayServer, churn: DeployedEndpoint) -> None:
    assert 200 == score(gateway, "churn", np.ones((1, 3)), churn.now)["status"]
    assert 401 == score(gateway, "churn", np.ones((1, 3)), churn.now, key="another-key-of-some-length")["status"]


@pytest.mark.machines
def test_a_version_is_switched_and_the_earlier_one_taken_down_without_a_lost_request(
    triton: TritonServer, gateway: GatewayServer, churn: DeployedEndpoint, put: Put
) -> None:
    with calling(gateway, "churn", churn.now) as callers:
        endpoint = put("churn", churn.other)

    assert (0, []) == (callers.lost, callers.reasons)
    assert (churn.version,) == endpoint.removed
    assert [churn.other_version] == loaded(triton, "churn")
    assert {"1", "2"} == set(callers.versions)


@pytest.mark.machines
def test_a_version_whose_process_died_is_deployed_again_by_the_same_call_and_can_be_retired(
    client: GatewayClient, triton: TritonServer, gateway: GatewayServer, versions: dict[str, str], put: Put
) -> None:
    from flows.endpoint import retire_endpoint

    put("mortal", versions["first"])
    for pid in list_instances(triton, "mortal"):
        os.kill(pid, signal.SIGKILL)
    dead = score(gateway, "mortal", np.ones((1, 3)), versions["first"])
    again = put("mortal", versions["first"])
    alive = score(gateway, "mortal", np.ones((1, 3)), versions["first"])

    assert (500, 200, ()) == (dead["status"], alive["status"], again.removed)
    assert (again.version,) == retire_endpoint("mortal", gateway=gateway.url)
    assert [] == loaded(triton, "mortal")
    assert client.get("mortal") is None


@pytest.mark.machines
def test_a_canary_that_keeps_its_rule_is_promoted(
    triton: TritonServer, gateway: GatewayServer, churn: DeployedEndpoint, put: Put
) -> None:
    with calling(gateway, "churn", churn.now) as callers:
        endpoint = put("churn", churn.other, rollout=CANARY)

    assert 0 == callers.lost
    assert f"version {churn.other_version} has all traffic, after a canary: 0 of " in endpoint.rollout
    assert [churn.other_version] == loaded(triton, "churn")


@pytest.mark.machines
def test_a_canary_that_fails_under_traffic_is_rolled_back_and_taken_down_without_a_lost_request(
    triton: TritonServer,
    gateway: GatewayServer,
    client: GatewayClient,
    versions: dict[str, str],
    churn: DeployedEndpoint,
    put: Put,
) -> None:
    before = client.get("churn")
    with (
        calling(gateway, "churn", churn.now) as callers,
        pytest.raises(RolledBack, match=rf"requests failed.* version {churn.version} serves on"),
    ):
        put("churn", versions["delicate"], rollout=CANARY)

    after = client.get("churn")
    assert (0, []) == (callers.lost, callers.reasons)
    assert before is not None
    assert after is not None
    assert before.route == after.route
    assert [churn.version] == loaded(triton, "churn")


@pytest.mark.machines
def test_a_canary_without_requests_is_rolled_back_with_an_error(
    triton: TritonServer, gateway: GatewayServer, churn: DeployedEndpoint, put: Put
) -> None:
    with pytest.raises(RolledBack, match=r"must keep the rule .*got 0 of 20 requests in 0.5 s"):
        put("churn", churn.other, rollout=UNASKED)

    assert [churn.version] == loaded(triton, "churn")
    assert churn.version == score(gateway, "churn", np.ones((1, 3)), churn.now)["model_version"]


@pytest.mark.machines
def test_a_shadow_gets_copies_is_kept_where_a_canary_fails_and_gets_its_traffic_by_a_later_call(
    triton: TritonServer, gateway: GatewayServer, client: GatewayClient, churn: DeployedEndpoint, put: Put
) -> None:
    put("churn", churn.other, rollout=Shadow())
    before = client.get("churn")
    answers = {score(gateway, "churn", np.ones((1, 3)), churn.now)["model_version"] for _ in range(5)}

    assert {churn.version} == answers
    assert ["1", "2"] == loaded(triton, "churn")

    with pytest.raises(RolledBack, match=rf"stays a shadow, and version {churn.version} serves on"):
        put("churn", churn.other, rollout=UNASKED)
    after = client.get("churn")

    assert before is not None
    assert after is not None
    assert before.route == after.route
    assert ["1", "2"] == loaded(triton, "churn")

    endpoint = put("churn", churn.other)

    assert (churn.version,) == endpoint.removed
    assert churn.other_version == score(gateway, "churn", np.ones((1, 3)), churn.now)["model_version"]


def test_a_version_that_answers_otherwise_than_its_model_never_gets_traffic(
    triton: TritonServer, gateway: GatewayServer, versions: dict[str, str], churn: DeployedEndpoint, put: Put
) -> None:
    with pytest.raises(VerifyFailed, match=rf"as the model itself does .* version {churn.version} serves on"):
        put("churn", versions["moody"])

    assert [churn.version] == loaded(triton, "churn")
    assert churn.version == score(gateway, "churn", np.ones((1, 3)), churn.now)["model_version"]


def test_a_first_version_that_fails_leaves_nothing(
    triton: TritonServer, client: GatewayClient, versions: dict[str, str], put: Put
) -> None:
    with pytest.raises(VerifyFailed, match="nothing serves now"):
        put("unborn", versions["moody"])

    assert client.get("unborn") is None
    assert [] == loaded(triton, "unborn")


def test_a_budget_that_can_t_be_kept_is_refused_before_anything_is_put_up(
    triton: TritonServer, client: GatewayClient, sleepy: str, put: Put
) -> None:
    with pytest.raises(LatencyImpossible, match="must be at least"):
        put("hasty", sleepy, budget={"latency_ms": 20, "rate": 5})

    assert client.get("hasty") is None
    assert [] == loaded(triton, "hasty")


@pytest.fixture(scope="module")
def slow_served(registry: Path) -> str:
    """A model of which each pass takes 60 ms under Triton, and hardly anything where the batching is chosen."""
    from tests.support import register_script

    return register_script(
        "slow-served", "'triton_python_backend_utils' in __import__('sys').modules and time.sleep(0.06)"
    )


@pytest.mark.machines
def test_a_setting_that_breaks_its_budget_under_load_is_replaced_by_one_that_keeps_it(
    triton: TritonServer, gateway: GatewayServer, slow_served: str, put: Put
) -> None:
    from flows.endpoint import retire_endpoint

    # In passes of one or four rows it takes 66 rows a second at most; in a burst, the last waits for 1.6 s.
    budget = {"latency_ms": 900, "rate": 120, "callers": 64}
    endpoint = put("replaced", slow_served, budget=budget, measure_seconds=0.6)

    assert endpoint.chosen.setting is not None
    assert 32 == endpoint.batching.batch_size_max
    assert endpoint.checked is not None
    assert endpoint.checked.is_kept
    assert ("1",) == retire_endpoint("replaced", target(triton), gateway.url)


@pytest.mark.machines
def test_a_release_that_keeps_its_budget_with_no_setting_is_refused_with_what_was_measured(
    triton: TritonServer, client: GatewayClient, registry: Path, put: Put
) -> None:
    from tests.support import register_script

    # A pass takes far less than half of the budget here, and more than all of it under Triton.
    late = register_script("late", "'triton_python_backend_utils' in __import__('sys').modules and time.sleep(0.25)")
    with pytest.raises(BudgetBroken, match=r"within 200 ms, .*got 1 replica, .*p99 .*nothing serves now"):
        put("late", late, budget={"latency_ms": 200, "rate": 5, "callers": 4}, measure_seconds=0.4)

    assert client.get("late") is None
    assert [] == loaded(triton, "late")


@pytest.mark.machines
def test_an_explicit_batching_that_breaks_its_budget_is_refused_and_one_that_keeps_it_serves_with_it(
    triton: TritonServer, client: GatewayClient, slow_served: str, put: Put
) -> None:
    # Passes of one row take 16 rows a second at most; those of 32 rows take hundreds.
    terms = {"budget": {"latency_ms": 1000, "rate": 40}, "measure_seconds": 0.5}
    with pytest.raises(BudgetBroken, match=r"got each request alone: .*leave batching out.*nothing serves now"):
        put("explicit", slow_served, batching={"batch_size_max": 1}, **terms)

    assert client.get("explicit") is None
    assert [] == loaded(triton, "explicit")

    from flows.endpoint import retire_endpoint

    endpoint = put("explicit", slow_served, batching={"batch_size_max": 32}, **terms)

    assert (32, None) == (endpoint.batching.batch_size_max, endpoint.chosen.setting)
    assert endpoint.checked is not None
    assert endpoint.checked.is_kept
    assert ("1",) == retire_endpoint("explicit", target(triton), client.url)


def test_a_target_that_does_not_answer_is_named_in_the_error(
    client: GatewayClient, versions: dict[str, str], put: Put, tmp_path: Path
) -> None:
    nowhere = Triton(repository=str(tmp_path), url="http://127.0.0.1:9", grpc="127.0.0.1:9")
    with pytest.raises(EndpointFailed, match=r"127.0.0.1:9.*nothing serves now"):
        put("nowhere", versions["first"], target=nowhere)

    assert client.get("nowhere") is None


def test_a_gateway_that_does_not_answer_is_named(versions: dict[str, str], put: Put) -> None:
    with pytest.raises(EndpointFailed, match=r"http://127.0.0.1:9"):
        put("nowhere", versions["first"], gateway="http://127.0.0.1:9")


def test_a_key_that_is_not_there_is_named_before_anything_is_put_up(
    client: GatewayClient, versions: dict[str, str], put: Put
) -> None:
    with pytest.raises(BadInput, match="'NO_SUCH_KEY' must hold a key"):
        put("keyless", versions["first"], access={"environment": ["NO_SUCH_KEY"]})

    assert client.get("keyless") is None


def test_versions_of_another_model_do_not_pass_for_those_that_serve(
    gateway: GatewayServer, client: GatewayClient, churn: DeployedEndpoint, linear: str, put: Put
) -> None:
    state = client.get("churn")
    assert state is not None
    number = linear.rpartition("/")[2]
    (served,) = state.route.versions
    client.put("mixed", state.route.model_copy(update={"versions": (served.model_copy(update={"version": number}),)}))
    with pytest.raises(BadInput, match=rf"one registered model, but version {number} of mixed serves already"):
        put("mixed", linear)

    assert 200 == score(gateway, "mixed", np.ones((1, 3)), churn.now)["status"]
    client.delete("mixed")


@pytest.mark.machines
def test_an_idle_endpoint_is_unloaded_loaded_by_the_next_request_and_kept_while_a_version_is_deployed(
    triton: TritonServer, gateway: GatewayServer, client: GatewayClient, churn: DeployedEndpoint, put: Put
) -> None:
    put("churn", churn.now, keep_warm=1)
    client.wait_until("churn", lambda state: state.models == "asleep", timeout_s=30)

    assert [] == loaded(triton, "churn")
    # Each of them comes when the models are about to be unloaded, or just were.
    with calling(gateway, "churn", churn.now, rate=0.8) as callers:
        put("churn", churn.other, keep_warm=1)

    state = client.get("churn")
    assert (0, []) == (callers.lost, callers.reasons)
    assert [churn.other_version] == loaded(triton, "churn")
    assert state is not None
    assert state.route.sleep is not None
    assert 1 == state.route.sleep.keep_warm_s

    put("churn", churn.other)


def test_nothing_that_was_rendered_or_kept_holds_a_key(
    triton: TritonServer, gateway: GatewayServer, churn: DeployedEndpoint
) -> None:
    files = [path for folder in (triton.repository, triton.folder, gateway.folder) for path in folder.rglob("*")]
    holding = [path for path in files if path.is_file() and not path.is_symlink() and KEY.encode() in path.read_bytes()]

    assert [] == holding
    assert os.environ[VARIABLE] == KEY
    assert any(re.search("config.pbtxt", str(path)) for path in files)


# The last, since it takes down what the others share.
def test_a_retired_endpoint_is_gone_and_retiring_it_again_is_no_error(
    triton: TritonServer, gateway: GatewayServer, churn: DeployedEndpoint, tmp_path: Path
) -> None:
    from flows.endpoint import retire_endpoint

    elsewhere = RayServe(dashboard="http://127.0.0.1:9", folder=str(tmp_path))
    with pytest.raises(EndpointFailed, match=r"must answer at http://127.0.0.1:9"):
        retire_endpoint("churn", elsewhere, gateway.url)

    assert 200 == score(gateway, "churn", np.ones((1, 3)), churn.now)["status"]
    assert (churn.version,) == retire_endpoint("churn", target(triton), gateway.url)
    assert [] == loaded(triton, "churn")
    assert 404 == score(gateway, "churn", np.ones((1, 3)), churn.now)["status"]
    assert () == retire_endpoint("churn", target(triton), gateway.url)


@pytest.mark.machines
def test_a_model_that_others_serve_is_verified_gets_its_traffic_and_stays_where_it_is(
    triton: TritonServer,
    gateway: GatewayServer,
    client: GatewayClient,
    versions: dict[str, str],
    network: str,
    put: Put,
) -> None:
    from flows.endpoint import retire_endpoint

    def serve_elsewhere(name: str, model: str) -> External:
        put(name, model)
        state = client.get(name)
        assert state is not None
        (served,) = state.route.versions
        return External(url=triton.url, model=served.upstream_model, version=served.upstream_version)

    one, other = serve_elsewhere("team-1", versions["first"]), serve_elsewhere("team-2", versions["second"])
    before = httpx.post(f"{triton.url}/v2/repository/index").json()
    budget = {"latency_ms": 2000, "rate": 20, "callers": 8}
    first = put("bought", versions["first"], target=one, budget=budget, measure_seconds=0.5)
    second = put("bought", versions["second"], target=other)

    assert first.checked is not None
    assert (first.version,) == second.removed
    assert 200 == score(gateway, "bought", np.ones((2, 3)), versions["second"])["status"]
    with pytest.raises(VerifyFailed, match=rf"The release gets no traffic, and version {second.version} serves on"):
        put("bought", network, target=other)

    assert (second.version,) == retire_endpoint("bought", None, gateway.url)
    assert client.get("bought") is None
    assert before == httpx.post(f"{triton.url}/v2/repository/index").json()


@pytest.fixture(scope="module")
def chain(registry: Path) -> tuple[str, str, str]:
    """Three models that are the steps of a graph."""
    return register_chain()


def ask_graph(gateway: GatewayServer, put_graph: PutGraph, rows: dict[str, Any]) -> httpx.Response:
    content = encode_request(put_graph.graph.contract, rows).content
    url = f"{gateway.url}/v2/models/{put_graph.graph.endpoint}/infer"
    return httpx.post(url, content=content, headers={"Authorization": f"Bearer {KEY}"}, timeout=ANSWER_SECONDS_MAX)


def check_graph(gateway: GatewayServer, put_graph: PutGraph) -> None:
    """Hold what the gateway answers for a graph against what its models answer one by one."""
    rows = raw_rows(7)
    answer = ask_graph(gateway, put_graph, rows)
    assert 200 == answer.status_code, answer.text
    outputs = {each["name"]: each["data"] for each in answer.json()["outputs"]}
    expected = put_graph.predict(rows)

    np.testing.assert_allclose(expected["probability"], outputs["probability"], rtol=0, atol=1e-6)
    assert expected["word"].tolist() == outputs["word"]


@pytest.mark.machines
def test_a_graph_goes_online_changes_one_step_sleeps_and_is_retired(
    triton: TritonServer, gateway: GatewayServer, client: GatewayClient, chain: tuple[str, str, str], put: Put
) -> None:
    from flows.endpoint import retire_endpoint

    budget = {"latency_ms": 500, "rate": 20, "callers": 8}
    first = put("graph", None, steps=chain, budget=budget, measure_seconds=0.5)
    again = put("graph", None, steps=chain, budget=budget, measure_seconds=0.5)
    serving = graph_of(chain, "graph")
    check_graph(gateway, serving)

    assert list(chain) == list(first.models)
    assert "graph serves " + ", then ".join(chain) in first.summary
    assert 32 == first.verification.rows_random
    assert first.checked is not None
    assert again.checked is None  # nothing was deployed: the graph is up already
    assert first.version == again.version

    steps = (register_prep(scale=3.0), *chain[1:])
    second = put("graph", None, steps=steps, keep_warm=1)
    changed = graph_of(steps, "graph")
    check_graph(gateway, changed)

    assert (first.version,) == second.removed
    assert [] == list(triton.repository.glob(f"graph.v{first.version}*"))
    eventually(lambda: not loaded(triton, f"graph.v{second.version}.2"))
    # A request waits a minute for the models of three steps. Where that is too short, it is told to come again.
    waits = HTTPStatus.SERVICE_UNAVAILABLE
    eventually(lambda: ask_graph(gateway, changed, raw_rows(7)).status_code, lambda code: code != waits, seconds=600)
    check_graph(gateway, changed)

    assert (second.version,) == retire_endpoint("graph", target(triton), gateway.url)
    assert [] == list(triton.repository.glob("graph*"))
    assert client.get("graph") is None


@pytest.mark.machines
def test_a_graph_with_a_step_that_answers_differently_each_time_is_taken_down(
    triton: TritonServer, client: GatewayClient, chain: tuple[str, str, str], put: Put
) -> None:
    score = tensor("score", "float32", 1)
    answer = '{"label": (model_input["score"] + np.random.random()).astype("float32")}'
    moody = register_step("graph-moody", answer, [score], [tensor("label", "float32", 1)])
    with pytest.raises(VerifyFailed, match=r"must answer 'label' as the model itself does.* nothing serves now"):
        put("moody", None, steps=[*chain[:2], moody])

    assert client.get("moody") is None
    assert [] == list(triton.repository.glob("moody*"))


@pytest.mark.machines
def test_the_graph_of_the_docs_goes_online(
    triton: TritonServer, gateway: GatewayServer, chain: tuple[str, str, str], prefect: PrefectServer
) -> None:
    from flows.endpoint import retire_endpoint

    copies = {"models:/churn-features/1": chain[0], "models:/churn-label/1": chain[2]}
    for wanted, uri in copies.items():
        copy_model(uri, wanted)
    for _ in range(3):
        copy_model(chain[1], "models:/churn")
    page = (Path(__file__).parents[2] / "docs/endpoints.md").read_text()
    (block,) = re.findall(r"```python\n(from flows[^`]*steps=[^`]*)```", page)
    changed = block.replace('name="churn"', 'name="churn-graph", gateway=GATEWAY').replace(
        'Triton(repository="/srv/models")', "TARGET"
    )
    found: dict[str, Any] = {"GATEWAY": gateway.url, "TARGET": target(triton)}
    exec(compile(changed, "docs/endpoints.md", "exec"), found)  # noqa: S102 - our own page

    endpoint: Endpoint = found["endpoint"]
    assert ("models:/churn-features/1", "models:/churn/3", "models:/churn-label/1") == endpoint.models
    assert (endpoint.version,) == retire_endpoint("churn-graph", target(triton), gateway.url)


def copy_model(uri: str, wanted: str) -> None:
    """Register a model under another name."""
    import mlflow

    name = wanted.removeprefix("models:/").partition("/")[0]
    mlflow.MlflowClient().copy_model_version(uri, name)
