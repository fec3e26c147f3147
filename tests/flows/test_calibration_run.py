"""A model measured for real: passes, an endpoint and a batch run in processes of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from infra.local.prefect_server import PrefectServer
from serving.errors import ProfileFailed, TooManyRejects
from tasks.batch.options import BatchOptions
from tasks.common.events import RUN_REFUSED
from tasks.endpoint.deploy import make_host
from tasks.endpoint.resolve import LoadedModel, load_endpoint_model
from tasks.endpoint.spec import EndpointSpec
from tasks.endpoint.targets import Triton
from tasks.scheduler.profile import ProfileOptions, StatedFigures, measure_profile, read_profile
from tests.prefect_events import find_events
from tests.servers import triton_or_skip

pytestmark = pytest.mark.servers

OPTIONS = BatchOptions(key_columns=("customer",), batch_size=512)


@pytest.fixture(scope="module")
def spec(registry: Path) -> EndpointSpec:
    from tests.support import register_network

    return EndpointSpec(name="measured", model=register_network("measured", seed=3))


def never(*_: object) -> NoReturn:
    pytest.fail("nothing is to be measured")


@pytest.mark.machines
def test_a_model_is_measured_once_and_its_profile_kept_with_its_version(
    prefect: PrefectServer, spec: EndpointSpec, customers: Path
) -> None:
    from flows.runtime.calibration_run import run_calibration

    options = ProfileOptions(source=str(customers), batch_options=OPTIONS, batch_run_seconds=0.2)
    profile = measure_profile(spec, load_endpoint_model(spec), options, run_calibration)
    again = measure_profile(spec, load_endpoint_model(spec), options, never)

    assert again == profile
    # A start is a process that imports torch and loads the model.
    assert 1 / profile.batch_rows_per_second < profile.start_seconds
    assert 0 < profile.request_ms < 1000 * profile.cold_start_seconds
    assert profile.request_busy_ms is not None
    assert 0 < profile.pass_time.seconds(1) < profile.start_seconds
    assert (
        read_profile(load_endpoint_model(spec), ProfileOptions(batch_options=OPTIONS.model_copy(update={"slots": 1})))
        is None
    )


def test_stated_figures_are_not_measured_and_have_a_profile_of_their_own(spec: EndpointSpec, customers: Path) -> None:
    stated = StatedFigures(batch_rows_per_second=7.0, start_seconds=1.0, cold_start_seconds=2.0, request_ms=3.0)
    subject, options = (
        load_endpoint_model(spec),
        ProfileOptions(batch_options=OPTIONS.model_copy(update={"slots": 2}), stated_figures=stated),
    )
    profile = measure_profile(spec, subject, options, never)

    assert (7.0, 1.0, 2.0, 3.0) == (
        *(profile.batch_rows_per_second, profile.start_seconds, profile.cold_start_seconds, profile.request_ms),
    )
    assert read_profile(load_endpoint_model(spec), options) == profile
    assert (
        read_profile(load_endpoint_model(spec), options.model_copy(update={"stated_figures": StatedFigures()})) is None
    )


@pytest.mark.machines
def test_start_and_requests_are_measured_on_a_model_server_which_is_left_as_it_was(
    spec: EndpointSpec, tmp_path: Path
) -> None:
    with triton_or_skip(tmp_path) as server:
        target = Triton(repository=str(server.repository), url=server.url, grpc=server.grpc)
        stated = StatedFigures(batch_rows_per_second=7.0, start_seconds=1.0)
        options = ProfileOptions(batch_options=OPTIONS, target=target, stated_figures=stated)
        profile = measure_profile(spec, load_endpoint_model(spec), options, never)

        assert read_profile(load_endpoint_model(spec), options) == profile
        assert read_profile(load_endpoint_model(spec), options.model_copy(update={"target": None})) is None
        assert {} == make_host(target).list_endpoints()

    assert 0 < profile.request_ms < 1000 * profile.cold_start_seconds
    assert (7.0, 1.0) == (profile.batch_rows_per_second, profile.start_seconds)


def test_a_batch_run_that_fails_is_an_error_with_its_output_and_no_event(
    prefect: PrefectServer, spec: EndpointSpec, tmp_path: Path
) -> None:
    from flows.runtime.calibration_run import run_calibration
    from tasks.batch.events import RunCall, emit_refusal

    with pytest.raises(ProfileFailed, match=r"must go through to be measured, got: The source must name.*nothing-here"):
        run_calibration(spec.model, tmp_path / "nothing-here", tmp_path / "scores", OPTIONS)
    # An event of the process, which has ended, would be there before this one.
    later = RunCall(model=spec.model, source="/data", destination=str(tmp_path / "scores" / "first"))
    with pytest.raises(TooManyRejects), emit_refusal(later):
        raise TooManyRejects
    (event,) = find_events(prefect, RUN_REFUSED, f"overnight.destination.{later.destination}")

    assert "TooManyRejects" == event["payload"]["error"]


def test_an_endpoint_that_does_not_start_is_an_error_with_its_log(spec: EndpointSpec, tmp_path: Path) -> None:
    subject = load_endpoint_model(spec)
    (tmp_path / "MLmodel").write_text("flavors: {}")
    broken: LoadedModel = replace(subject, resolved=replace(subject.resolved, folder=tmp_path))
    stated = StatedFigures(batch_rows_per_second=7.0, start_seconds=1.0)
    with pytest.raises(ProfileFailed, match=r"(?s)must answer to be measured.*a process of its own.*state cold_start"):
        measure_profile(
            spec, broken, ProfileOptions(batch_options=OPTIONS, stated_figures=stated, remeasure=True), never
        )
