"""A model measured for real: passes, an endpoint and a batch run in processes of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from infra.local.prefect_server import PrefectServer
from serving.errors import ProfileFailed
from tasks.batch.options import BatchOptions
from tasks.endpoint.deploy import make_host
from tasks.endpoint.resolve import LoadedModel, load_endpoint_model
from tasks.endpoint.spec import EndpointSpec, Triton
from tasks.scheduler.profile import Measuring, Stated, measure_profile, recall_profile
from tests.servers import triton_or_skip

OPTIONS = BatchOptions(key_columns=("customer",), batch_size=512)


@pytest.fixture(scope="module")
def spec(registry: Path) -> EndpointSpec:
    from tests.support import register_network

    return EndpointSpec(name="measured", model=register_network("measured", seed=3))


def never(*_: object) -> NoReturn:
    pytest.fail("nothing is to be measured")


def test_a_model_is_measured_once_and_remembered_with_its_version(
    prefect: PrefectServer, spec: EndpointSpec, customers: Path
) -> None:
    from flows.runtime.calibration_run import run_trial

    measuring = Measuring(source=str(customers), options=OPTIONS, seconds=0.2)
    profile = measure_profile(spec, load_endpoint_model(spec), measuring, run_trial)
    again = measure_profile(spec, load_endpoint_model(spec), measuring, never)

    assert again == profile
    assert 1000 < profile.batch_rows_per_second
    # Each is a process that imports torch and loads the model.
    assert 0.5 < profile.start_seconds < 120
    assert 0.5 < profile.cold_start_seconds < 120
    assert 0 < profile.request_ms < 1000
    assert profile.request_busy_ms is not None
    assert 0 < profile.pass_time.seconds(1) < 0.1
    assert recall_profile(load_endpoint_model(spec), Measuring(options=OPTIONS.model_copy(update={"slots": 1}))) is None


def test_what_is_stated_is_not_measured_and_does_not_pass_for_measured(spec: EndpointSpec, customers: Path) -> None:
    stated = Stated(batch_rows_per_second=7.0, start_seconds=1.0, cold_start_seconds=2.0, request_ms=3.0)
    subject, measuring = (
        load_endpoint_model(spec),
        Measuring(options=OPTIONS.model_copy(update={"slots": 2}), stated=stated),
    )
    profile = measure_profile(spec, subject, measuring, never)

    assert (7.0, 1.0, 2.0, 3.0) == (
        *(profile.batch_rows_per_second, profile.start_seconds, profile.cold_start_seconds, profile.request_ms),
    )
    assert recall_profile(load_endpoint_model(spec), measuring) == profile
    assert recall_profile(load_endpoint_model(spec), measuring.model_copy(update={"stated": Stated()})) is None


def test_start_and_requests_are_measured_on_a_model_server_which_is_left_as_it_was(
    spec: EndpointSpec, tmp_path: Path
) -> None:
    with triton_or_skip(tmp_path) as server:
        target = Triton(repository=str(server.repository), url=server.url, grpc=server.grpc)
        stated = Stated(batch_rows_per_second=7.0, start_seconds=1.0)
        measuring = Measuring(options=OPTIONS, target=target, stated=stated)
        profile = measure_profile(spec, load_endpoint_model(spec), measuring, never)

        assert recall_profile(load_endpoint_model(spec), measuring) == profile
        assert recall_profile(load_endpoint_model(spec), measuring.model_copy(update={"target": None})) is None
        assert {} == make_host(target).endpoints()

    assert 0.1 < profile.cold_start_seconds < 120
    assert 0 < profile.request_ms < 1000
    assert (7.0, 1.0) == (profile.batch_rows_per_second, profile.start_seconds)


def test_a_batch_run_that_fails_is_an_error_that_says_what_it_said(
    prefect: PrefectServer, spec: EndpointSpec, tmp_path: Path
) -> None:
    from flows.runtime.calibration_run import run_trial

    with pytest.raises(ProfileFailed, match=r"must go through to be measured, got: The source must name.*nothing-here"):
        run_trial(spec.model, tmp_path / "nothing-here", tmp_path / "scores", OPTIONS)


def test_an_endpoint_that_does_not_come_up_is_an_error_that_says_what_it_said(
    spec: EndpointSpec, tmp_path: Path
) -> None:
    subject = load_endpoint_model(spec)
    (tmp_path / "MLmodel").write_text("flavors: {}")
    broken: LoadedModel = replace(subject, resolved=replace(subject.resolved, folder=tmp_path))
    stated = Stated(batch_rows_per_second=7.0, start_seconds=1.0)
    with pytest.raises(ProfileFailed, match=r"(?s)must answer to be measured.*a process of its own.*state cold_start"):
        measure_profile(spec, broken, Measuring(options=OPTIONS, stated=stated, again=True), never)
