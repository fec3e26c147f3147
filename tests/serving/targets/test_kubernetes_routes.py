"""The manifests of a rollout, held against the schemas of their kinds and against the route that they render."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import BadInput
from serving.gateway.route import (
    Limits,
    Rollout,
    Route,
    ServedVersion,
    Shadow,
    SleepRule,
    promote_canary,
    roll_back_canary,
)
from serving.model.release import Release, Scaling
from serving.targets.bentoml import BentoMLTarget
from serving.targets.kserve import KServeTarget
from serving.targets.kubernetes_cluster import Cluster, ClusterTarget, Manifest, dump_manifests, place_versions
from serving.targets.kubernetes_routes import format_duration, render_gateway_api, spread_weights
from serving.targets.seldon import SeldonTarget
from tests.serving.targets.manifests import STABLE, check_all
from tests.serving.toys import matrix

CLUSTER = Cluster(
    gateway="public", gateway_namespace="gateways", namespace="models", listener="http", grpc_listener="grpc"
)
TARGETS: dict[str, ClusterTarget] = {
    "bentoml": BentoMLTarget(python=Path("python")),
    "kserve": KServeTarget(python=Path("python"), namespace="models"),
    "seldon": SeldonTarget(python=Path("python"), namespace="models"),
}


def served(version: str, weight: float = 0.0, **changes: Any) -> ServedVersion:
    given = {"url": f"http://scores-v{version}.models.svc:8000", "upstream_model": "scores", **changes}
    return ServedVersion(version=version, weight=weight, **given)


def route(*versions: ServedVersion, **changes: Any) -> Route:
    return Route(versions=versions, contract=matrix(3), **changes)


def render(rendered: Route) -> dict[str, list[Manifest]]:
    return check_all(render_gateway_api("scores", rendered, CLUSTER))


def render_on(target: str, rendered: Route) -> dict[str, list[Manifest]]:
    releases = {each.version: release(each.version) for each in rendered.versions}
    return check_all(TARGETS[target].render_rollout("scores", rendered, releases, CLUSTER))


def release(version: str, scaling: Scaling | None = None) -> Release:
    pin = STABLE.pin.model_copy(update={"version": version})
    return STABLE.model_copy(update={"pin": pin, "scaling": scaling or Scaling(replicas_min=2, replicas_max=4)})


def list_rules(manifests: Iterable[Manifest]) -> list[dict[str, Any]]:
    return [rule for each in manifests for rule in each["spec"]["rules"]]


def find_rule(routes: list[Manifest], path: str, method: str = "POST") -> dict[str, Any]:
    """The one rule that a request falls under."""
    (rule,) = [
        rule
        for rule in list_rules(routes)
        if {"path": {"type": "Exact", "value": path}, "method": method} in rule["matches"]
    ]
    return rule


def list_filters(rule: dict[str, Any]) -> list[str]:
    return [each["type"] for each in rule.get("filters", [])]


def find_upstream(rule: dict[str, Any], path: str) -> str:
    """The path that a server is asked under a rule."""
    rewrites = [each["urlRewrite"]["path"] for each in rule.get("filters", []) if each["type"] == "URLRewrite"]
    return str(rewrites[0]["replaceFullPath"]) if rewrites else path


CANARY = route(served("1", 90), served("2", 10), rollout=Rollout(version="2"))
SHADOW = route(served("1", 100), served("2"), shadow=Shadow(version="2"))


def test_a_canary_gets_its_share_of_the_requests_that_name_no_version() -> None:
    (split, first, second) = render(CANARY)["HTTPRoute"]
    rule = find_rule([split, first, second], "/v2/models/scores/infer")

    assert [{"name": "public", "namespace": "gateways", "sectionName": "http"}] == split["spec"]["parentRefs"]
    assert [("scores-v1", 8000, 90), ("scores-v2", 8000, 10)] == [
        (each["name"], each["port"], each["weight"]) for each in rule["backendRefs"]
    ]
    assert {"request": "10s"} == rule["timeouts"]
    assert [] == list_filters(rule)


def test_a_request_that_names_a_version_goes_to_it_alone() -> None:
    routes = render(roll_back_canary(CANARY))["HTTPRoute"]
    path = "/v2/models/scores/versions/2/infer"
    rule = find_rule(routes, path)

    assert [{"name": "scores-v2", "port": 8000}] == rule["backendRefs"]
    assert "/v2/models/scores/infer" == find_upstream(rule, path)
    assert ["scores-v1"] == [each["name"] for each in find_rule(routes, "/v2/models/scores/infer")["backendRefs"]]


def test_the_next_step_of_a_rollout_is_the_manifests_of_the_next_route() -> None:
    rule = find_rule(render(promote_canary(CANARY))["HTTPRoute"], "/v2/models/scores/infer")

    assert [("scores-v2", 100)] == [(each["name"], each["weight"]) for each in rule["backendRefs"]]


def test_a_shadow_gets_copies_of_inferences_and_no_request_of_its_own() -> None:
    routes = render(SHADOW)["HTTPRoute"]
    (mirror,) = find_rule(routes, "/v2/models/scores/infer")["filters"]

    assert {"backendRef": {"name": "scores-v2", "port": 8000}} == mirror["requestMirror"]
    assert ["scores", "scores-v1"] == [each["metadata"]["name"] for each in routes]
    assert [] == list_filters(find_rule(routes, "/v2/models/scores", "GET"))


def test_nothing_but_the_models_own_paths_is_reachable() -> None:
    # Triton's trace settings and its repository are beside them.
    matched = {
        (match["method"], match["path"]["type"], match["path"]["value"])
        for rule in list_rules(render(route(served("1", 1)))["HTTPRoute"])
        for match in rule["matches"]
    }

    assert {
        (method, "Exact", f"/v2/models/scores{version}{tail}")
        for version in ("", "/versions/1")
        for method, tail in (("POST", "/infer"), ("GET", ""), ("GET", "/ready"))
    } == matched


def test_a_model_of_another_name_on_its_server_is_asked_by_that_name() -> None:
    other = served("1", 1, upstream_model="churn", upstream_version="7", url="http://triton.models.svc/base/")
    routes = render(route(other))["HTTPRoute"]

    for method, tail in (("POST", "/infer"), ("GET", ""), ("GET", "/ready")):
        path = f"/v2/models/scores{tail}"
        rule = find_rule(routes, path, method)
        assert f"/base/v2/models/churn/versions/7{tail}" == find_upstream(rule, path)
        assert [{"name": "triton", "port": 80, "weight": 1}] == rule["backendRefs"]


def test_keys_are_those_of_a_secret_that_is_named_and_never_shown() -> None:
    keyed = render(CANARY.model_copy(update={"keys": ("APP_KEY",)}))
    (policy,) = keyed["SecurityPolicy"]
    access = policy["spec"]["apiKeyAuth"]

    assert [{"name": "scores-keys"}] == access["credentialRefs"]
    assert [{"headers": ["Authorization"]}] == access["extractFrom"]
    routes = [("HTTPRoute", each["metadata"]["name"]) for each in keyed["HTTPRoute"]]
    assert routes == [(each["kind"], each["name"]) for each in policy["spec"]["targetRefs"]]
    assert "SecurityPolicy" not in render(CANARY)


def test_limits_are_envoys_own() -> None:
    limits = Limits(bytes_max=3 << 20, requests_per_second=2.5, in_flight_max=8, queue_max=2, timeout_s=0.25)
    found = render(route(served("1", 1), limits=limits))
    traffic = found["BackendTrafficPolicy"][0]["spec"]

    assert {"limit": "3Mi"} == traffic["requestBuffer"]
    assert [{"limit": {"requests": 150, "unit": "Minute"}}] == traffic["rateLimit"]["local"]["rules"]
    assert {"maxConnections": 8, "maxParallelRequests": 10, "maxPendingRequests": 10} == traffic["circuitBreaker"]
    assert {"request": "250ms"} == find_rule(found["HTTPRoute"], "/v2/models/scores/infer")["timeouts"]
    assert "rateLimit" not in render(route(served("1", 1)))["BackendTrafficPolicy"][0]["spec"]


def test_grpc_callers_name_the_endpoint_by_metadata() -> None:
    versions = [served(version, 50, grpc=f"scores-v{version}.models.svc:8001") for version in "12"]
    shadow = served("3", grpc="scores-v3.models.svc:8001")
    found = render(route(*versions, shadow, shadow=Shadow(version="3")))
    grpc, first, second = found["GRPCRoute"]
    infer, others = grpc["spec"]["rules"]
    assert ["grpc"] == [each["sectionName"] for each in grpc["spec"]["parentRefs"]]
    for version, named in (("1", first), ("2", second)):
        (rule, _) = named["spec"]["rules"]
        assert [{"name": f"scores-v{version}", "port": 8001}] == rule["backendRefs"]
        assert [("overnight-endpoint", "scores"), ("overnight-version", version)] == [
            (each["name"], each["value"]) for each in rule["matches"][0]["headers"]
        ]

    assert [("scores-v1", 8001, 50), ("scores-v2", 8001, 50)] == [
        (each["name"], each["port"], each["weight"]) for each in infer["backendRefs"]
    ]
    assert [("ModelInfer", "scores")] == [
        (each["method"]["method"], each["headers"][0]["value"]) for each in infer["matches"]
    ]
    assert ["RequestMirror"] == list_filters(infer)
    assert ["ModelMetadata", "ModelReady"] == [each["method"]["method"] for each in others["matches"]]
    policy = found["BackendTrafficPolicy"][0]["spec"]
    assert {"scores", "scores-v1", "scores-v2"} == {
        each["name"] for each in policy["targetRefs"] if each["kind"] == "GRPCRoute"
    }
    assert "10s" == policy["timeout"]["http"]["requestTimeout"]


ASLEEP = route(served("1", 1), sleep=SleepRule(keep_warm_s=60))
MLFLOW = route(served("1", 1, speaks="mlflow-tensors"))
TWO_PATHS = route(served("1", 1, upstream_version="1"), served("2", 1, upstream_version="2"))
ANSWERING_SHADOW = route(served("1", 1), served("2", 1), shadow=Shadow(version="2"))
ELSEWHERE = route(served("1", 1, url="http://10.0.0.1:8000"))
NEIGHBOUR = route(served("1", 1, url="http://scores-v1.others.svc:8000"))
ENCRYPTED = route(served("1", 1, url="https://scores-v1.models.svc:8000"))
SOME_GRPC = route(served("1", 1, grpc="scores-v1.models.svc:8001"), served("2", 1))
RENAMED_GRPC = route(served("1", 1, grpc="scores-v1.models.svc:8001", upstream_model="churn"))
ODD_RATE = route(served("1", 1), limits=Limits(requests_per_second=1.23456))
CAPITAL = route(served("RC1", 1, url="http://scores.models.svc"))
CROWD = route(*(served(str(number), 1) for number in range(17)))


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (ASLEEP, "must stay loaded, but scores has `sleep`. Leave out keep_warm"),
        (MLFLOW, "must speak v2, .* version 1 of scores speaks mlflow-tensors"),
        (TWO_PATHS, "must be asked by one path, .* got /v2/models/scores/versions/1, /v2/models/scores/versions/2"),
        (ANSWERING_SHADOW, "A shadow must have no weight, but version 2 of scores has 1"),
        (ELSEWHERE, r"as http://SERVICE.models.svc:PORT, got http://10.0.0.1:8000 for version 1"),
        (NEIGHBOUR, r"must be a Service of it, .* got http://scores-v1.others.svc:8000"),
        (ENCRYPTED, r"must be a Service of it, .* got https://"),
        (SOME_GRPC, "must all have a gRPC address or none, but version 2 of scores has none"),
        (RENAMED_GRPC, "must be called as its endpoint, .* version 1 of scores is called churn"),
        (ODD_RATE, "a whole number of requests a second, minute or hour, got 1.23456 a second"),
        (CAPITAL, "must be at most 63 lowercase letters, .* got 'scores-vRC1'"),
        (CROWD, "At most 16 versions may share requests on a cluster, got 17"),
    ],
)
def test_what_an_envoy_cannot_do_is_refused_by_name(refused: Route, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        render_gateway_api("scores", refused, CLUSTER)


@pytest.mark.parametrize(("listener", "grpc_listener"), [(None, "grpc"), ("http", None), ("one", "one")])
def test_grpc_needs_a_listener_beside_that_of_http(listener: str | None, grpc_listener: str | None) -> None:
    cluster = Cluster(gateway="public", namespace="models", listener=listener, grpc_listener=grpc_listener)
    both = route(served("1", 1, grpc="scores-v1.models.svc:8001"))

    with pytest.raises(BadInput, match="HTTP and gRPC must have a listener of the Gateway each"):
        render_gateway_api("scores", both, cluster)
    assert "GRPCRoute" not in check_all(render_gateway_api("scores", route(served("1", 1)), cluster))


@pytest.mark.parametrize(
    ("seconds", "written"), [(10.0, "10s"), (0.25, "250ms"), (1.5, "1s500ms"), (3600.0, "3600s"), (1e-9, "1ms")]
)
def test_a_duration_is_written_in_seconds_and_milliseconds(seconds: float, written: str) -> None:
    assert written == format_duration(seconds)


WEIGHTS = st.one_of(st.integers(0, 10**6).map(float), st.floats(0, 1e6, allow_subnormal=False))


@given(st.lists(WEIGHTS, min_size=1, max_size=16).filter(any))
def test_weights_become_whole_numbers_that_keep_their_shares(weights: list[float]) -> None:
    whole = spread_weights(weights)

    assert [weight > 0 for weight in weights] == [each > 0 for each in whole]
    if all(weight.is_integer() for weight in weights):
        assert weights == whole
    elif whole != [round(weight) for weight in weights]:
        assert 10**6 == sum(whole)
    for weight, each in zip(weights, whole, strict=True):
        # Each of sixteen may be lifted to one of a million.
        assert abs(weight / sum(weights) - each / sum(whole)) < 20e-6
    assert all(0 <= each <= 10**6 for each in whole)


@st.composite
def routes(draw: st.DrawFn) -> Route:
    """Any route of up to six versions on one kind of server, with a canary or a shadow or neither."""
    count = draw(st.integers(1, 6))
    weights = draw(st.lists(WEIGHTS, min_size=count, max_size=count).filter(any))
    answering = [number for number, weight in enumerate(weights) if weight]
    idle = [number for number, weight in enumerate(weights) if not weight]
    rules: dict[str, Any] = {}
    if len(answering) > 1 and draw(st.booleans()):
        rules["rollout"] = Rollout(version=str(draw(st.sampled_from(answering)) + 1))
    if idle and draw(st.booleans()):
        rules["shadow"] = Shadow(version=str(draw(st.sampled_from(idle)) + 1))
    port = draw(st.sampled_from([None, 8001]))
    return route(
        *(
            served(str(number), weight, grpc=port and f"scores-v{number}.models.svc:{port}")
            for number, weight in enumerate(weights, start=1)
        ),
        keys=draw(st.sampled_from([(), ("APP",), ("APP", "OPS")])),
        limits=draw(st.builds(Limits, timeout_s=st.floats(1e-3, 3600), bytes_max=st.integers(1, 1 << 30))),
        **rules,
    )


@given(routes())
def test_every_version_with_weight_answers_once_in_its_share_and_a_shadow_never(rendered: Route) -> None:
    found = render(rendered)
    split = find_rule(found["HTTPRoute"], "/v2/models/scores/infer")
    shares = {each["name"]: each["weight"] for each in split["backendRefs"]}
    total = sum(each.weight for each in rendered.versions)

    assert len(shares) == len(split["backendRefs"])
    if "GRPCRoute" in found:
        infer = found["GRPCRoute"][0]["spec"]["rules"][0]
        assert list(shares.items()) == [(each["name"], each["weight"]) for each in infer["backendRefs"]]
    assert {f"scores-v{each.version}" for each in rendered.versions if each.weight} == set(shares)
    for each in rendered.versions:
        share = shares.get(f"scores-v{each.version}", 0) / sum(shares.values())
        assert abs(each.weight / total - share) < 20e-6
    rules = list_rules([*found["HTTPRoute"], *found.get("GRPCRoute", [])])
    backends = {each["name"] for rule in rules for each in rule["backendRefs"]}
    mirrors = {
        each["requestMirror"]["backendRef"]["name"]
        for rule in rules
        for each in rule.get("filters", [])
        if each["type"] == "RequestMirror"
    }
    assert mirrors == ({f"scores-v{rendered.shadow.version}"} if rendered.shadow else set())
    assert not mirrors & backends
    assert bool(rendered.keys) == ("SecurityPolicy" in found)


@given(routes())
def test_policies_hold_for_every_route_and_the_file_reads_back(rendered: Route) -> None:
    manifests = render_gateway_api("scores", rendered, CLUSTER)
    names = {(each["kind"], each["metadata"]["name"]) for each in manifests if each["kind"].endswith("Route")}

    for each in manifests:
        if each["kind"].endswith("Policy"):
            assert names == {(target["kind"], target["name"]) for target in each["spec"]["targetRefs"]}
    written = dump_manifests(manifests)
    assert list(manifests) == list(yaml.safe_load_all(written))
    assert b"&id" not in written


@given(routes())
def test_seldon_divides_the_same_requests_by_its_experiment(rendered: Route) -> None:
    found = render_on("seldon", rendered)
    (experiment,) = found["Experiment"]
    shares = {each["name"]: each["weight"] for each in experiment["spec"]["candidates"]}

    answering = [each for each in rendered.versions if each.weight]
    assert shares == dict(
        zip(
            (f"scores-v{each.version}" for each in answering),
            spread_weights([each.weight for each in answering]),
            strict=True,
        )
    )
    assert {f"scores-v{each.version}" for each in rendered.versions} == {
        each["metadata"]["name"] for each in found["Model"]
    }
    mirror = experiment["spec"].get("mirror", {}).get("name")
    assert mirror == (f"scores-v{rendered.shadow.version}" if rendered.shadow else None)
    assert mirror not in shares


def test_requests_reach_seldons_envoy_with_the_name_of_the_experiment_or_of_a_version() -> None:
    found = render_on("seldon", CANARY.model_copy(update={"keys": ("APP",)}))
    infer = find_rule(found["HTTPRoute"], "/v2/models/scores/infer")
    named = find_rule(found["HTTPRoute"], "/v2/models/scores/versions/2/infer")

    for rule, model in ((infer, "scores.experiment"), (named, "scores-v2")):
        (header,) = [each for each in rule["filters"] if each["type"] == "RequestHeaderModifier"]
        assert [{"name": "seldon-model", "value": model}] == header["requestHeaderModifier"]["set"]
        assert [{"name": "seldon-mesh", "port": 80}] == rule["backendRefs"]
    # With one, Seldon would divide the requests that name that version.
    assert "default" not in found["Experiment"][0]["spec"]
    assert {"scores", "scores-v1", "scores-v2"} == {
        each["name"] for each in found["SecurityPolicy"][0]["spec"]["targetRefs"]
    }


def test_kserve_serves_each_version_and_the_clusters_envoy_divides_the_requests() -> None:
    found = render_on("kserve", CANARY)
    (service,) = found["InferenceService"]
    (canary,) = service["spec"]["canary"]
    rule = find_rule(found["HTTPRoute"], "/v2/models/scores/infer")

    assert ("v1", "v2", 10) == (service["spec"]["predictor"]["name"], canary["predictor"]["name"], 10)
    assert [("scores-v1-predictor", 80, 90), ("scores-v2-predictor", 80, 10)] == [
        (each["name"], each["port"], each["weight"]) for each in rule["backendRefs"]
    ]
    # KServe's own HTTPRoute would ask for no key.
    assert "cluster-local" == service["metadata"]["labels"]["networking.kserve.io/visibility"]


def test_a_promotion_on_kserve_keeps_the_canarys_predictor() -> None:
    before = render_on("kserve", CANARY)["InferenceService"][0]["spec"]["canary"][0]["predictor"]
    promoted = promote_canary(CANARY)
    after = render_on("kserve", route(*(each for each in promoted.versions if each.weight)))["InferenceService"][0]

    assert before["name"] == after["spec"]["predictor"]["name"]
    assert before["model"] == after["spec"]["predictor"]["model"]
    assert "canary" not in after["spec"]


def test_a_shadow_on_kserve_is_a_canary_without_requests_that_gets_copies() -> None:
    found = render_on("kserve", SHADOW)
    (canary,) = found["InferenceService"][0]["spec"]["canary"]
    (mirror,) = find_rule(found["HTTPRoute"], "/v2/models/scores/infer")["filters"]

    assert ("v2", 0) == (canary["predictor"]["name"], canary["trafficPercent"])
    assert 1 <= canary["predictor"]["minReplicas"]
    assert "scores-v2-predictor" == mirror["requestMirror"]["backendRef"]["name"]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any), st.integers(1, 4), st.integers(1, 4))
def test_kserves_percents_are_those_of_the_weights(shares: list[int], stable: int, canary: int) -> None:
    # In percent: the first has what the others leave.
    weights = [100 - sum(shares[1:]), *shares[1:]]
    rendered = route(*(served(str(number + 1), weight) for number, weight in enumerate(weights)))
    releases = {
        each.version: release(each.version, Scaling(replicas_min=canary if number else stable, replicas_max=8))
        for number, each in enumerate(rendered.versions)
    }
    found = check_all(TARGETS["kserve"].render_rollout("scores", rendered, releases, CLUSTER))

    canaries = found["InferenceService"][0]["spec"].get("canary", [])
    assert weights[1:] == [each["trafficPercent"] for each in canaries]


@pytest.mark.parametrize(
    ("refused", "scaling", "words"),
    [
        (route(served("1", 87.5), served("2", 12.5)), Scaling(), "must get a whole percentage .* got 87.5"),
        (CANARY, Scaling(replicas_min=0), "version 1 of scores may have none. Set replicas_min to 1"),
    ],
)
def test_what_kserve_cannot_do_is_refused_by_name(refused: Route, scaling: Scaling, words: str) -> None:
    releases = {each.version: release(each.version, scaling) for each in refused.versions}

    with pytest.raises(BadInput, match=words):
        TARGETS["kserve"].render_rollout("scores", refused, releases, CLUSTER)


@pytest.mark.parametrize("target", TARGETS)
def test_a_route_of_this_machine_is_rendered_for_the_services_of_the_cluster(target: str) -> None:
    here = route(
        *(served(version, 50, url=f"http://127.0.0.1:4000{version}", grpc="127.0.0.1:5000") for version in "12")
    )
    found = render_on(target, here)

    assert b"127.0.0.1" not in dump_manifests(each for listed in found.values() for each in listed)
    metadata = [each["metadata"] for listed in found.values() for each in listed]
    assert {"models"} == {each["namespace"] for each in metadata}
    # By which those are found that a later step has no more.
    assert {("scores", "overnight")} == {
        tuple(each["labels"][f"app.kubernetes.io/{name}"] for name in ("part-of", "managed-by")) for each in metadata
    }


def test_placed_versions_are_services_that_serve_the_endpoint_under_its_own_name() -> None:
    (placed,) = place_versions(route(served("3", 1, upstream_version="9")), "scores", "models").versions

    assert ("http://scores-v3.models.svc", "scores", None) == (
        placed.url,
        placed.upstream_model,
        placed.upstream_version,
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: text.replace('"backendRefs"', '"backendRef"'), "backendRef"),
        (lambda text: text.replace('"10s"', '"10 seconds"'), "10 seconds"),
        (lambda text: text.replace('"weight": 90', '"weight": 90.5'), "90.5"),
        (lambda text: text.replace('"RequestMirror"', '"Mirror"'), "Mirror"),
        (lambda text: text.replace('"Local"', '"local"'), "local"),
        (lambda text: text.replace('"connect-failure"', '"5xx"'), "5xx"),
    ],
)
def test_a_mistake_in_a_manifest_is_caught(spoil: Callable[[str], str], words: str) -> None:
    limits = Limits(requests_per_second=5)
    versions = (served("1", 90), served("2", 10), served("3"))
    manifests = render_gateway_api("scores", route(*versions, shadow=Shadow(version="3"), limits=limits), CLUSTER)
    written = json.dumps(manifests)
    assert written != spoil(written)

    with pytest.raises(jsonschema.ValidationError, match=words):
        check_all(json.loads(spoil(written)))


def test_whole_definitions_are_held_against_where_they_are_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"type": "object", "properties": {"targetRefs": {"type": "array"}}}
    properties = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "spec": spec}
    version = {"name": "v1alpha1", "schema": {"openAPIV3Schema": {"type": "object", "properties": properties}}}
    definition = {
        "kind": "CustomResourceDefinition",
        "spec": {
            "group": "gateway.envoyproxy.io",
            "names": {"kind": "BackendTrafficPolicy"},
            "versions": [version],
        },
    }
    (tmp_path / "crds.yaml").write_text(yaml.safe_dump({"kind": "List", "items": [definition]}))
    monkeypatch.setenv("OVERNIGHT_CRDS", str(tmp_path))

    with pytest.raises(jsonschema.ValidationError, match="circuitBreaker"):
        render(CANARY)
