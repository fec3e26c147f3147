"""The public API of Overnight: five flows, what opens their predictions, and the types of their parameters.

`batch_inference` scores a dataset, `nightly_inference` does so by a deadline on the cheapest machines,
`online_endpoint` puts a model behind an endpoint, `stream_inference` scores messages, and `choose_mode` decides which
of these serves a workload at the lowest cost. Each flow has a module here; `runtime` holds how flows run.

Names are imported when they are first used: `import flows` alone loads neither Prefect nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flows.runtime.uncaught import show_uncaught_shortly
from serving.machine import pause_garbage_collection

if TYPE_CHECKING:
    from flows.batch import batch_inference
    from flows.endpoint import online_endpoint, retire_endpoint
    from flows.nightly import nightly_inference
    from flows.scheduler import choose_mode, review_modes
    from flows.stream import stream_inference
    from serving.gateway.route import Limits
    from serving.model.batching import BatchingConfig
    from serving.model.contract import ColumnPolicy
    from serving.model.release import Scaling
    from tasks.batch.manifest import open_predictions, open_rejects
    from tasks.batch.options import BatchOptions, CsvOptions, Ray, Threads
    from tasks.endpoint.spec import (
        Access,
        AllAtOnce,
        BentoML,
        Budget,
        Canary,
        EndpointSpec,
        KServe,
        RayServe,
        Seldon,
        Shadow,
        Triton,
    )
    from tasks.scheduler.deployment_plan import ApplyConfig, BatchApplyConfig, OnlineApplyConfig, StreamApplyConfig
    from tasks.scheduler.profile import ProfileOptions, StatedFigures
    from tasks.scheduler.review import Hysteresis
    from tasks.scheduler.workload import (
        ArrivalRate,
        ArrivalTrace,
        Events,
        Machine,
        MeteredArrivals,
        Prices,
        Requests,
        Spot,
        Table,
        Workload,
    )
    from tasks.spot.purchase import PurchaseOptions
    from tasks.stream.options import FromKafka, FromNats, StreamOptions, ToKafka, ToNats, ToParts

__all__ = [
    "Access",
    "AllAtOnce",
    "ApplyConfig",
    "ArrivalRate",
    "ArrivalTrace",
    "BatchApplyConfig",
    "BatchOptions",
    "BatchingConfig",
    "BentoML",
    "Budget",
    "Canary",
    "ColumnPolicy",
    "CsvOptions",
    "EndpointSpec",
    "Events",
    "FromKafka",
    "FromNats",
    "Hysteresis",
    "KServe",
    "Limits",
    "Machine",
    "MeteredArrivals",
    "OnlineApplyConfig",
    "Prices",
    "ProfileOptions",
    "PurchaseOptions",
    "Ray",
    "RayServe",
    "Requests",
    "Scaling",
    "Seldon",
    "Shadow",
    "Spot",
    "StatedFigures",
    "StreamApplyConfig",
    "StreamOptions",
    "Table",
    "Threads",
    "ToKafka",
    "ToNats",
    "ToParts",
    "Triton",
    "Workload",
    "batch_inference",
    "choose_mode",
    "nightly_inference",
    "online_endpoint",
    "open_predictions",
    "open_rejects",
    "retire_endpoint",
    "review_modes",
    "stream_inference",
]

_MODULES = {
    "flows.batch": ("batch_inference",),
    "flows.endpoint": ("online_endpoint", "retire_endpoint"),
    "flows.nightly": ("nightly_inference",),
    "flows.scheduler": ("choose_mode", "review_modes"),
    "flows.stream": ("stream_inference",),
    "serving.gateway.route": ("Limits",),
    "serving.model.batching": ("BatchingConfig",),
    "serving.model.contract": ("ColumnPolicy",),
    "serving.model.release": ("Scaling",),
    "tasks.batch.options": ("BatchOptions", "CsvOptions", "Ray", "Threads"),
    "tasks.batch.manifest": ("open_predictions", "open_rejects"),
    "tasks.endpoint.spec": (
        "Access",
        "AllAtOnce",
        "BentoML",
        "Budget",
        "Canary",
        "EndpointSpec",
        "KServe",
        "RayServe",
        "Seldon",
        "Shadow",
        "Triton",
    ),
    "tasks.scheduler.profile": ("ProfileOptions", "StatedFigures"),
    "tasks.scheduler.review": ("Hysteresis",),
    "tasks.scheduler.deployment_plan": ("BatchApplyConfig", "OnlineApplyConfig", "StreamApplyConfig", "ApplyConfig"),
    "tasks.scheduler.workload": (
        "Events",
        "Machine",
        "MeteredArrivals",
        "Prices",
        "ArrivalRate",
        "Requests",
        "Spot",
        "Table",
        "ArrivalTrace",
        "Workload",
    ),
    "tasks.spot.purchase": ("PurchaseOptions",),
    "tasks.stream.options": ("FromKafka", "FromNats", "StreamOptions", "ToKafka", "ToNats", "ToParts"),
}
_MODULE_BY_NAME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_BY_NAME:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    show_uncaught_shortly()
    with pause_garbage_collection():
        value = globals()[name] = getattr(import_module(_MODULE_BY_NAME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
