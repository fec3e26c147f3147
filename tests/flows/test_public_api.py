"""The public API: what `from flows import ...` gives, and at what cost."""

from __future__ import annotations

import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from prefect import Flow
from pydantic import BaseModel

import flows

ROOT = Path(__file__).parents[2]
FLOWS = [name for name in flows.__all__ if isinstance(getattr(flows, name), Flow)]


def find_option_types(annotation: object, found: set[type[BaseModel]]) -> set[type[BaseModel]]:
    """Add the pydantic models that a parameter may be made of, however deep within it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation not in found:
            found.add(annotation)
            for field in annotation.model_fields.values():
                find_option_types(field.annotation, found)
    else:
        for inner in typing.get_args(annotation):
            find_option_types(inner, found)
    return found


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_flows_and_readers_are_public() -> None:
    assert {
        *(
            "batch_inference",
            "backfill_inference",
            "nightly_inference",
            "online_endpoint",
            "retire_endpoint",
            "stream_inference",
        ),
        *("choose_mode", "review_modes"),
    } == set(FLOWS)
    assert {"open_predictions", "open_rejects", "write_rejects"} <= set(flows.__all__)


def test_every_type_that_a_flow_takes_is_public() -> None:
    found: set[type[BaseModel]] = set()
    for name in FLOWS:
        hints = typing.get_type_hints(getattr(flows, name).fn, include_extras=True)
        for parameter in hints.keys() - {"return"}:
            find_option_types(hints[parameter], found)

    assert set() == {kind for kind in found if getattr(flows, kind.__name__, None) is not kind}


@pytest.mark.parametrize("name", flows.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    value = getattr(flows, name)
    described = value.fn if isinstance(value, Flow) else value

    assert inspect.getdoc(described)
    if inspect.isclass(described):
        assert described.__doc__ != BaseModel.__doc__


def test_importing_the_package_imports_neither_prefect_nor_torch() -> None:
    assert "[]" == run_python("import sys, flows; print(sorted({'prefect', 'torch', 'mlflow'} & set(sys.modules)))")


def test_what_describes_an_endpoint_or_reads_its_release_does_not_import_mlflow() -> None:
    modules = "serving.targets.triton_autoscale, serving.targets.ray_application"
    heavy = "{'prefect', 'torch', 'mlflow'}"

    assert "[]" == run_python(
        f"import sys, flows, {modules}; flows.EndpointSpec; print(sorted({heavy} & set(sys.modules)))"
    )


# What an import or a call may change of a process: a hook, what makes log records, filters, what is called at its end.
_PROCESS = """
import atexit, gc, logging, sys
import prefect.main
def look():
    filters = logging.getLogger("prefect.flow_runs").filters
    return logging.getLogRecordFactory(), list(filters), sys.excepthook
before = look()
atexit.register(lambda: print("garbage:", gc.get_freeze_count() == 0))
import flows.batch, flows.endpoint, flows.nightly, flows.scheduler, flows.stream
print("import:", look() == before)
try:
    flows.batch_inference{how}
except ValueError:
    pass
print("call:", look() == before)
"""


@pytest.mark.parametrize(
    ("how", "environment", "expected"),
    [
        ("('x', 'customers')", {}, "import: True call: True garbage: True"),
        # A flow of others that calls this one, in a process that Prefect has started for it.
        ("('x', 'customers')", {"PREFECT__FLOW_RUN_ID": "x"}, "import: True call: True garbage: True"),
        # As Prefect's engine does before it runs the flow that the process was started for.
        (".validate_parameters({})", {"PREFECT__FLOW_RUN_ID": "x"}, "import: True call: False garbage: False"),
    ],
    ids=["a script", "a flow of others", "a flow run"],
)
def test_the_process_of_a_flow_run_alone_is_changed_for_good(
    how: str, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT__FLOW_RUN_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert expected == " ".join(run_python(_PROCESS.format(how=how)).split())


def test_what_a_caller_has_frozen_stays_so_and_is_counted_once() -> None:
    code = """
import gc
import flows.batch
count, counted = gc.get_freeze_count, []
gc.get_freeze_count = lambda: counted.append(count()) or counted[-1]
def call():
    try:
        flows.batch_inference("x", "customers")
    except ValueError:
        return count() > 0, len(counted)
first = call()
gc.freeze()
print(first, [call() for _ in range(3)])
"""

    assert "(False, 1) [(True, 2), (True, 2), (True, 2)]" == run_python(code)


def test_a_name_is_imported_when_it_is_used_and_modules_keep_their_names() -> None:
    code = (
        "from types import ModuleType\n"
        "from flows import BatchOptions, batch, batch_inference\n"
        "import flows.batch\n"
        "print(isinstance(flows.batch, ModuleType), batch is flows.batch, batch.batch_inference is batch_inference)"
    )

    assert "True True True" == run_python(code)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'flows' has no attribute 'batch_inferences'"):
        flows.batch_inferences  # noqa: B018 - the access itself fails
