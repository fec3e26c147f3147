"""The public API of Overnight: six flows, what opens their predictions, and the types of their parameters.

`batch_inference` scores a dataset, `backfill_inference` does so partition by partition or version by version,
`nightly_inference` by a deadline on the cheapest machines. `online_endpoint` puts a model behind an endpoint,
`stream_inference` scores messages, and `choose_mode` decides which of these serves a workload at the lowest cost. Each
flow has a module here; `runtime` holds how flows run.

Names are imported when they are first used: `import flows` alone loads neither Prefect nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from serving.machine import pause_garbage_collection

if TYPE_CHECKING:
    from flows.backfill import backfill_inference
    from flows.batch import batch_inference
    from flows.endpoint import online_endpoint, retire_endpoint
    from flows.nightly import nightly_inference
    from flows.scheduler import choose_mode, review_modes
    from flows.stream import stream_inference
    from serving.gateway.route import Limits
    from serving.model.batching import BatchingConfig
    from serving.model.contract import ColumnPolicy
    from serving.model.release import Scaling
    from serving.model.uv import PackageSource
    from serving.targets.kubernetes_cluster import Cluster
    from tasks.batch.backfill import BackfillOptions, Partitions, TableTimes, TableVersions, open_backfill
    from tasks.batch.challenger_rules import Labels, PromoteIf
    from tasks.batch.comparison_records import compare_challengers, open_challenger
    from tasks.batch.feature_table import FeatureTable
    from tasks.batch.gate_rules import (
        DEFAULT_RULES,
        ExpressionRule,
        Gate,
        KsRule,
        LastRun,
        MeanShiftRule,
        NamedRun,
        NullRateRule,
        PsiRule,
        RangeRule,
        RejectRateRule,
        RowCountRule,
        StatisticsFile,
        TrainingSet,
    )
    from tasks.batch.manifest import open_predictions, open_rejects
    from tasks.batch.options import BatchOptions, CsvOptions, Ray, Threads
    from tasks.batch.reject_rows import write_rejects
    from tasks.batch.training_set import log_training_statistics
    from tasks.endpoint.spec import Access, AllAtOnce, Budget, Canary, EndpointSpec, Shadow, Step
    from tasks.endpoint.targets import BentoML, External, KServe, RayServe, Seldon, Triton
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
    from tasks.spot.purchase import AwsMachines, LocalMachines, PurchaseOptions, StandingMachines
    from tasks.stream.options import FromKafka, FromNats, StreamOptions, ToKafka, ToNats, ToParts

__all__ = [
    "DEFAULT_RULES",
    "Access",
    "AllAtOnce",
    "ApplyConfig",
    "ArrivalRate",
    "ArrivalTrace",
    "AwsMachines",
    "BackfillOptions",
    "BatchApplyConfig",
    "BatchOptions",
    "BatchingConfig",
    "BentoML",
    "Budget",
    "Canary",
    "Cluster",
    "ColumnPolicy",
    "CsvOptions",
    "EndpointSpec",
    "Events",
    "ExpressionRule",
    "External",
    "FeatureTable",
    "FromKafka",
    "FromNats",
    "Gate",
    "Hysteresis",
    "KServe",
    "KsRule",
    "Labels",
    "LastRun",
    "Limits",
    "LocalMachines",
    "Machine",
    "MeanShiftRule",
    "MeteredArrivals",
    "NamedRun",
    "NullRateRule",
    "OnlineApplyConfig",
    "PackageSource",
    "Partitions",
    "Prices",
    "ProfileOptions",
    "PromoteIf",
    "PsiRule",
    "PurchaseOptions",
    "RangeRule",
    "Ray",
    "RayServe",
    "RejectRateRule",
    "Requests",
    "RowCountRule",
    "Scaling",
    "Seldon",
    "Shadow",
    "Spot",
    "StandingMachines",
    "StatedFigures",
    "StatisticsFile",
    "Step",
    "StreamApplyConfig",
    "StreamOptions",
    "Table",
    "TableTimes",
    "TableVersions",
    "Threads",
    "ToKafka",
    "ToNats",
    "ToParts",
    "TrainingSet",
    "Triton",
    "Workload",
    "backfill_inference",
    "batch_inference",
    "choose_mode",
    "compare_challengers",
    "log_training_statistics",
    "nightly_inference",
    "online_endpoint",
    "open_backfill",
    "open_challenger",
    "open_predictions",
    "open_rejects",
    "retire_endpoint",
    "review_modes",
    "stream_inference",
    "write_rejects",
]

_MODULES = {
    "flows.backfill": ("backfill_inference",),
    "flows.batch": ("batch_inference",),
    "flows.endpoint": ("online_endpoint", "retire_endpoint"),
    "flows.nightly": ("nightly_inference",),
    "flows.scheduler": ("choose_mode", "review_modes"),
    "flows.stream": ("stream_inference",),
    "serving.gateway.route": ("Limits",),
    "serving.model.batching": ("BatchingConfig",),
    "serving.model.contract": ("ColumnPolicy",),
    "serving.model.release": ("Scaling",),
    "serving.targets.kubernetes_cluster": ("Cluster",),
    "serving.model.uv": ("PackageSource",),
    "tasks.batch.options": ("BatchOptions", "CsvOptions", "Ray", "Threads"),
    "tasks.batch.challenger_rules": ("Labels", "PromoteIf"),
    "tasks.batch.comparison_records": ("compare_challengers", "open_challenger"),
    "tasks.batch.feature_table": ("FeatureTable",),
    "tasks.batch.gate_rules": (
        "DEFAULT_RULES",
        "ExpressionRule",
        "Gate",
        "KsRule",
        "LastRun",
        "MeanShiftRule",
        "NamedRun",
        "NullRateRule",
        "PsiRule",
        "RangeRule",
        "RejectRateRule",
        "RowCountRule",
        "StatisticsFile",
        "TrainingSet",
    ),
    "tasks.batch.training_set": ("log_training_statistics",),
    "tasks.batch.backfill": ("BackfillOptions", "Partitions", "TableTimes", "TableVersions", "open_backfill"),
    "tasks.batch.manifest": ("open_predictions", "open_rejects"),
    "tasks.batch.reject_rows": ("write_rejects",),
    "tasks.endpoint.spec": ("Access", "AllAtOnce", "Budget", "Canary", "EndpointSpec", "Shadow", "Step"),
    "tasks.endpoint.targets": ("BentoML", "External", "KServe", "RayServe", "Seldon", "Triton"),
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
    "tasks.spot.purchase": ("AwsMachines", "LocalMachines", "PurchaseOptions", "StandingMachines"),
    "tasks.stream.options": ("FromKafka", "FromNats", "StreamOptions", "ToKafka", "ToNats", "ToParts"),
}
_MODULE_BY_NAME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_BY_NAME:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    module = _MODULE_BY_NAME[name]
    with pause_garbage_collection():
        value = globals()[name] = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
