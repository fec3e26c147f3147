"""The report of an endpoint, and a plot of how long requests waited without and with batching."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field

from serving.model.batching import BatchingConfig, BatchingSetting
from serving.model.contract import Frozen
from serving.redaction import hide_secrets
from tasks.common.artifacts import Logger, make_image, make_markdown, put_artifacts
from tasks.common.events import ENDPOINT_CHANGED, describe_model_resource, describe_resource, send_event
from tasks.common.formatting import encode_png
from tasks.endpoint.batching import BatchingChoice
from tasks.endpoint.budget import BudgetCheck
from tasks.endpoint.load import Latency
from tasks.endpoint.spec import Budget
from tasks.endpoint.verify import Verification

_INK, _AFTER, _LIMIT = "#1f2933", "#2f6f9f", "#b3261e"
_COLOURS = {"before the batching": "#c9a227", "with the batching": _AFTER, "in a burst": "#7a9a4f"}


class Endpoint(Frozen):
    """The report of an endpoint: where it answers, and what was measured and verified."""

    name: str = Field(description="The endpoint's name, by which callers ask for its model.")
    url: str = Field(description="Where predictions are asked: POST a request of the Open Inference Protocol (V2).")
    model: str = Field(description="The pinned model version; of a graph those of its steps, in words.")
    models: tuple[str, ...] = Field(default=(), description="The pinned model versions of a graph's steps.")
    model_digest: str = Field(description="SHA-256 over the model's files, or over the digests of a graph's models.")
    version: str = Field(description="The model version that this call deployed, or the number of the graph.")
    target: str = Field(description="The model server.")
    server: str = Field(description="Where the model server itself answers.")
    rollout: str = Field(description="The outcome of shifting traffic to it, in words.")
    callers: str = Field(description="Who may call it, in a sentence.")
    removed: tuple[str, ...] = Field(default=(), description="Earlier versions that no longer serve.")
    chosen: BatchingChoice = Field(description="The batching, and what it was chosen by.")
    budget: Budget | None = Field(default=None, description="The budget that it is held against.")
    keep_warm_seconds: float | None = Field(default=None, description="Seconds until it is unloaded; null: never.")
    verification: Verification = Field(description="The comparison of its answers with the model's own.")
    before: Latency | None = Field(default=None, description="How long requests waited without batching.")
    checked: BudgetCheck | None = Field(default=None, description="How long they waited with it, under load.")
    seconds: dict[str, float] = Field(description="Wall-clock seconds by stage.")

    @property
    def batching(self) -> BatchingConfig:
        """The batching that it serves with."""
        return self.chosen.batching

    @property
    def summary(self) -> str:
        """The endpoint in two sentences: what serves, and who may call it."""
        return f"{self.name} serves {self.model} on {self.target} at {self.url}: {self.rollout}. {self.callers}"

    def table(self) -> list[dict[str, str]]:
        """Return the report as rows of two columns, in reading order."""
        verified = self.verification
        rows = {
            "model": self.model,
            "target": f"{self.target} at {self.server}",
            "asked at": self.url,
            "traffic": self.rollout,
            "callers": self.callers,
            **({"no longer served": ", ".join(f"version {each}" for each in self.removed)} if self.removed else {}),
            "batching": "by those who run the server" if self.target == "external" else self.chosen.describe(),
            **({"a pass of b rows": f"{self.chosen.cost.describe()}, as measured"} if self.chosen.cost else {}),
            **(_describe_setting(self.chosen.setting) if self.chosen.setting else {}),
            **(_describe_budget(self.budget, self.checked) if self.budget else {}),
            **{f"waited {when}": _describe_latency(each) for when, each in self.latencies().items()},
            "unloaded": f"after {self.keep_warm_seconds:g} s without a request" if self.keep_warm_seconds else "never",
            "verified": f"{verified.rows_example} rows of the model's example, {verified.rows_random} random rows",
            "furthest answer": f"{verified.difference_max:.2g} off, of {verified.tolerance:g} allowed",
            **{f"seconds: {stage}": f"{seconds:.2f}" for stage, seconds in self.seconds.items()},
        }
        return [{"": name, "value": value} for name, value in rows.items()]

    def latencies(self) -> dict[str, Latency]:
        """Return what was measured, by when."""
        checked = (self.checked.steady, self.checked.burst) if self.checked else (None, None)
        measured = dict(
            zip(("before the batching", "with the batching", "in a burst"), (self.before, *checked), strict=True)
        )
        return {when: each for when, each in measured.items() if each is not None}

    def markdown(self) -> str:
        """Return the report as Markdown."""
        rows = "\n".join(f"| {row['']} | {row['value']} |" for row in self.table())
        return f"# Endpoint {self.name}\n\n{self.summary}\n\n| | |\n| --- | --- |\n{rows}\n"


def _describe_setting(setting: BatchingSetting) -> dict[str, str]:
    simulated = f"p99 {setting.p99_ms:.3g} ms, in a burst of twice the rate {setting.burst_p99_ms:.3g} ms"
    return {"expected": f"{setting.utilisation:.0%} of what full passes take; {simulated}, by simulation"}


def _describe_budget(budget: Budget, checked: BudgetCheck | None) -> dict[str, str]:
    kept = ", not measured this time" if checked is None else ", kept" if checked.is_kept else ", NOT kept by p99"
    return {"budget": f"{budget.latency_ms:g} ms at {budget.rate:g} rows a second{kept}"}


def _describe_latency(latency: Latency) -> str:
    errors = f", {latency.errors} errors" if latency.errors else ""
    return f"p50 {latency.p50_ms:.3g} ms, p99 {latency.p99_ms:.3g} ms at {latency.rate:,.0f} requests/s{errors}"


def publish_endpoint(endpoint: Endpoint, logger: Logger) -> None:
    """Put the endpoint among the flow run's artifacts: its report, and the plot where anything was measured."""
    artifacts = [make_markdown("endpoint-report", endpoint.markdown(), endpoint.summary)]
    if endpoint.latencies():
        artifacts.append(make_image("endpoint-plot", draw_plot(endpoint), "What requests waited"))
    put_artifacts(artifacts, logger)


def emit_endpoint_changed(endpoint: Endpoint) -> None:
    """Send the event that an endpoint serves another release, or other traffic, than before."""
    payload = {
        "endpoint": endpoint.name,
        "url": hide_secrets(endpoint.url),
        "model": endpoint.model,
        "version": endpoint.version,
        "target": endpoint.target,
        "rollout": endpoint.rollout,
        "removed": list(endpoint.removed),
    }
    resource = describe_resource(
        "endpoint", endpoint.name, role=False, version=endpoint.version, target=endpoint.target
    )
    models = endpoint.models or (endpoint.model,)
    send_event(ENDPOINT_CHANGED, resource, [describe_model_resource(model) for model in models], payload)


def emit_endpoint_retired(name: str, versions: tuple[str, ...]) -> None:
    """Send the event that an endpoint is out of service."""
    resource = describe_resource("endpoint", name, role=False)
    send_event(ENDPOINT_CHANGED, resource, [], {"endpoint": name, "version": None, "removed": list(versions)})


def draw_plot(endpoint: Endpoint) -> bytes:
    """Draw what requests waited before and after the batching, and the passes it was chosen by; return a PNG."""
    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_latencies(left, endpoint)
    _draw_passes(right, endpoint.chosen)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return encode_png(figure)


def _draw_latencies(axes: Axes, endpoint: Endpoint) -> None:
    measured = endpoint.latencies()
    for when, latency in measured.items():
        colour = _COLOURS[when]
        share = np.arange(1, len(latency.samples_ms) + 1) / len(latency.samples_ms)
        label = f"{when}: p50 {latency.p50_ms:.3g} ms, p99 {latency.p99_ms:.3g} ms"
        axes.plot(latency.samples_ms, 100 * share, color=colour, label=label)
        axes.plot([latency.p50_ms, latency.p99_ms], [50, 99], "o", color=colour, markersize=4)
    if endpoint.budget is not None:
        axes.axvline(endpoint.budget.latency_ms, color=_LIMIT, linestyle="--", linewidth=1, label="the budget")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="milliseconds until the answer", ylabel="% of requests answered", ylim=(0, 102))
    rate = next(iter(measured.values())).rate
    axes.set_title(f"single rows, {rate:,.0f} requests a second", loc="left", fontsize=10)
    axes.legend(loc="lower right", frameon=False, fontsize=8)


def _draw_passes(axes: Axes, chosen: BatchingChoice) -> None:
    if chosen.cost is None:
        axes.set_axis_off()
        return
    rows, ms = zip(*chosen.passes, strict=True)
    axes.plot(rows, ms, "o", color=_INK, markersize=4, label="measured")
    line = sorted({math.ceil(each) for each in np.geomspace(1, max(rows), 64)})
    axes.plot(line, [1000 * chosen.cost.seconds(each) for each in line], color=_AFTER, label="a + c b")
    size = chosen.batching.batch_size_max
    axes.axvline(size, color=_LIMIT, linestyle=":", linewidth=1, label=f"the batching: {size:,} rows")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="rows in a pass", ylabel="milliseconds")
    axes.set_title("passes of the model itself", loc="left", fontsize=10)
    axes.legend(loc="upper left", frameon=False, fontsize=8)
