"""The report of a call: its figures, a plot, and a page that a person opens."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from serving.model.contract import Frozen
from serving.model.tuner import Tuning
from tasks.batch.comparison import ChallengerComparison, Promotion
from tasks.batch.comparison_plot import describe_challenger, describe_promotion
from tasks.batch.manifest import Manifest, RejectCount
from tasks.batch.parts import part_glob
from tasks.batch.plan import Plan
from tasks.batch.scoring_result import ScoringResult
from tasks.common.charts import INK, arrange_panels, draw_bars, draw_line
from tasks.common.formatting import data_uri, escape_markdown
from tasks.common.names import describe_model, find_last_folder
from tasks.storage import Storage

REPORT = "report.html"
_COLUMNS_SHOWN = 8


class BatchReport(Frozen):
    """What one call of batch_inference did."""

    status: Literal["scored", "already complete"] = Field(description="Whether this call scored anything.")
    run: str = Field(description="The run's key, or its explicit name.")
    plan_digest: str = Field(default="", description="What tells the published plan from others of the same run.")
    model: str = Field(description="The pinned model version.")
    model_digest: str = Field(description="SHA-256 over the model's files.")
    source: str
    destination: str
    output: str
    rows: int = Field(description="Rows of the dataset, all of them in the output.")
    findings: tuple[str, ...] = Field(default=(), description="What the gate says of the run, where it has one.")
    challengers: tuple[ChallengerComparison, ...] = Field(
        default=(), description="Each challenger beside the model, where the run has any."
    )
    promotion: Promotion | None = Field(
        default=None, description="Whether a challenger took the alias of the model, where that was asked for."
    )
    rejects: tuple[RejectCount, ...] = Field(description="Rows without a prediction, by column and reason.")
    nulls_kept: tuple[str, ...] = Field(default=(), description="Columns whose nulls the model got as missing values.")
    rows_key_null: int = Field(default=0, description="Rows whose key columns hold a null, in the output as they are.")
    keys_doubled: int | None = Field(
        default=None, description="Keys that occur more than once; None where this call did not look."
    )
    rows_scored: int = Field(description="Rows that this call scored.")
    rows_reused: int = Field(default=0, description="Rows whose parts an earlier run has made of the same.")
    reuse_note: str = Field(default="", description="Why not more of the rows are in parts of earlier runs.")
    rows_recomputed: int = Field(description="Rows scored again, since another worker was first or a part was torn.")
    parts: int
    slots: int
    batch_size: int
    engine: str = Field(description="How the passes were made.")
    tuning: Tuning | None = Field(description="What was measured to choose slots, batch size and engine, if it was.")
    memory_mb: int = Field(description="What the run's data was stated to take at its peak, in MiB.")
    seconds: dict[str, float] = Field(description="Wall-clock seconds by step.")
    thread_seconds: dict[str, float] = Field(description="Seconds of scoring by stage, over all threads.")
    report: str = Field(description="Where the page with the plot is.")
    mlflow_run: str | None = Field(
        default=None, description="Where the MLflow run with the lineage is, if there is one."
    )

    @property
    def rows_rejected(self) -> int:
        """How many rows have no prediction."""
        return sum(count.rows for count in self.rejects)

    @property
    def rows_per_second(self) -> float:
        """Rows that this call scored, by the wall-clock seconds of scoring."""
        return self.rows_scored / max(self.seconds.get("score", 0.0), 1e-9) if self.rows_scored else 0.0

    @property
    def title(self) -> str:
        """What is scored, and where it goes: churn v3 → predictions."""
        return f"{describe_model(self.model)} → {find_last_folder(self.destination)}"

    @property
    def read_with(self) -> str:
        """The line of Python that reads the predictions."""
        if self.rows_reused or self.output != "parquet":
            return f'flows.open_predictions("{self.destination}", "{self.run}").collect()'
        return f'pl.read_parquet("{self.destination}/{part_glob(self.run, self.plan_digest)}")'

    def table(self) -> list[dict[str, str]]:
        """Return the report as rows of two columns, in reading order."""
        rows = {
            "status": self.status,
            "model": self.model,
            "rows": f"{self.rows:,}",
            "rejects": f"{self.rows_rejected:,}",
            **{f"  {count.column or 'model'}: {count.reason}": f"{count.rows:,}" for count in self.rejects},
            **{f"  gate, {at}": finding for at, finding in enumerate(self.findings, start=1)},
            **{name: line for each in self.challengers for name, line in describe_challenger(each).items()},
            **(describe_promotion(self.promotion) if self.promotion else {}),
            **({"columns whose nulls are kept": self._name_nulls_kept()} if self.nulls_kept else {}),
            **({"rows with a null key": f"{self.rows_key_null:,}"} if self.rows_key_null else {}),
            **({"keys that occur more than once": f"{self.keys_doubled:,}"} if self.keys_doubled else {}),
            **(self._scoring_table() if self.status == "scored" else {}),
            **{f"seconds: {stage}": f"{seconds:.2f}" for stage, seconds in self.seconds.items()},
            **{f"thread seconds: {stage}": f"{seconds:.2f}" for stage, seconds in self.thread_seconds.items()},
            "predictions": f"{self.destination} ({self.parts} parts)",
        }
        return [{"": name, "value": value} for name, value in rows.items()]

    def _name_nulls_kept(self) -> str:
        more = len(self.nulls_kept) - _COLUMNS_SHOWN
        return ", ".join(self.nulls_kept[:_COLUMNS_SHOWN]) + (f" and {more} more" if more > 0 else "")

    def _scoring_table(self) -> dict[str, str]:
        return {
            "rows scored by this call": f"{self.rows_scored:,}",
            **({"rows of earlier runs": f"{self.rows_reused:,}"} if self.rows_reused or self.reuse_note else {}),
            **({"  why the rest was scored": self.reuse_note} if self.reuse_note else {}),
            "rows scored twice": f"{self.rows_recomputed:,}",
            "rows a second": f"{self.rows_per_second:,.0f}",
            "slots x batch size": f"{self.slots} x {self.batch_size:,}",
            "engine": self.engine,
            **(_tuning_table(self.tuning) if self.tuning else {}),
            "memory stated": f"{self.memory_mb:,} MiB",
        }

    def markdown(self) -> str:
        """Return the report as Markdown."""
        rows = _tabulate(self.table())
        return f"# Run {self.run}\n\n| | |\n| --- | --- |\n{rows}\n\nRead it with\n\n```python\n{self.read_with}\n```\n"

    def summary(self) -> str:
        """Return the figures of the call and links to everything else, as Markdown; details are in the page."""
        rows = _tabulate([row for row in self.table() if not row[""].startswith(" ")])
        links = {"predictions": self.destination, "page with the plot and all details": self.report}
        links |= {"MLflow run": self.mlflow_run} if self.mlflow_run else {}
        lines = "\n".join(f"- {name}: {_link(address)}" for name, address in links.items())
        return (
            f"# {escape_markdown(self.title)}\n\n| | |\n| --- | --- |\n{rows}\n\n{lines}\n\n"
            f"Read the predictions with\n\n```python\n{self.read_with}\n```\n"
        )


def _tabulate(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows of two columns as the lines of a table in Markdown."""
    return "\n".join(f"| {escape_markdown(row[''])} | {escape_markdown(row['value'])} |" for row in rows)


def _link(address: str) -> str:
    """Return an address as Markdown: one that a browser opens is a link, any other is shown as it is."""
    return f"[{address}]({address})" if address.startswith(("http://", "https://")) else f"`{address}`"


def _tuning_table(tuning: Tuning) -> dict[str, str]:
    """Return the fastest trial of each engine, in rows a second of all slots."""
    best: dict[str, str] = {}
    for trial in tuning.trials:
        words = f"{trial.rows_per_second:,.0f} rows/s in batches of {trial.batch_size:,}"
        off = f", at most {trial.difference:.2g} off" if trial.difference else ""
        best.setdefault(f"  tuned: {trial.engine}", words + off)
    return best


def report_scored(
    plan: Plan,
    storage: Storage,
    result: ScoringResult,
    manifest: Manifest,
    *,
    slots: int,
    memory: int,
    seconds: dict[str, float],
) -> BatchReport:
    """Return the report of a call that scored a run to its end.

    Args:
        plan: The plan that this call scored by.
        storage: The destination.
        result: What this call scored.
        manifest: What was published, whichever worker wrote its parts.
        slots: How many forward passes were made side by side.
        memory: Bytes that the run's data was stated to take.
        seconds: Wall-clock seconds by step.
    """
    return BatchReport(
        status="scored",
        run=plan.run,
        plan_digest=manifest.plan_digest,
        model=plan.model.uri,
        model_digest=plan.model.digest,
        source=plan.source.title,
        destination=storage.url,
        output=plan.options.output,
        rows=plan.rows,
        rejects=manifest.rejects,
        nulls_kept=plan.contract.nulls_kept,
        rows_key_null=manifest.rows_key_null,
        rows_scored=result.rows,
        rows_reused=plan.rows_reused,
        reuse_note=plan.reuse_note,
        rows_recomputed=result.rows_recomputed,
        parts=len(manifest.parts),
        slots=slots,
        batch_size=plan.batch_size,
        engine=str(plan.engine),
        tuning=plan.tuning,
        memory_mb=memory >> 20,
        seconds=dict(seconds),
        thread_seconds=result.seconds,
        report=storage.address(page_path(plan)),
    )


def report_complete(manifest: Manifest, plan: Plan, storage: Storage, seconds: dict[str, float]) -> BatchReport:
    """Return the report of a call that found its run complete."""
    return BatchReport(
        status="already complete",
        run=manifest.run,
        plan_digest=manifest.plan_digest,
        model=manifest.model.uri,
        model_digest=manifest.model.digest,
        source=manifest.source,
        destination=storage.url,
        output=manifest.output,
        rows=manifest.rows,
        rejects=manifest.rejects,
        nulls_kept=plan.contract.nulls_kept,
        rows_key_null=manifest.rows_key_null,
        rows_scored=0,
        rows_reused=plan.rows_reused,
        reuse_note=plan.reuse_note,
        rows_recomputed=0,
        parts=len(manifest.parts),
        slots=0,
        batch_size=plan.batch_size,
        engine=str(plan.engine),
        tuning=plan.tuning,
        memory_mb=0,
        seconds=dict(seconds),
        thread_seconds={},
        report=storage.address(page_path(plan)),
    )


Sample = tuple[float, int]


def draw_progress(report: BatchReport, samples: Sequence[Sample]) -> bytes:
    """Draw rows done over time, and where the slots' seconds went; return an SVG.

    `samples` are pairs of seconds since scoring began and rows that had their part by then.
    """
    title = f"{report.rows_scored:,} rows at {report.rows_per_second:,.0f} a second"
    seconds = [(name, taken, f"{taken:.1f}") for name, taken in report.thread_seconds.items()]
    panels = (
        draw_line(title, samples, report.rows, ("seconds", "rows with a part"), 590, 340),
        draw_bars("where the threads were", seconds, "seconds, over all threads", 400, 340),
    )
    return arrange_panels(panels, columns=2)


def page(report: BatchReport, progress: bytes, pictures: Mapping[str, bytes]) -> bytes:
    """Return the report as one HTML page that needs nothing else.

    Args:
        report: The report.
        progress: The picture of how the call went on, which `draw_progress` draws.
        pictures: Those of the predictions, by what each shows.
    """
    table = {"run": report.run, **{row[""]: row["value"] for row in report.table()}}
    of_scoring = {name: table.pop(name) for name in [*table] if "seconds" in name}
    title = html.escape(report.title)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;color:{INK};max-width:62rem;margin:2rem auto;padding:0 1rem}}
td{{padding:.15rem 1.5rem .15rem 0;border-bottom:1px solid #e4e7eb}}img{{max-width:100%}}
pre{{background:#f5f7fa;padding:.8rem;overflow:auto}}table{{margin:1rem 0}}</style>
<h1>{title}</h1>{"".join(_show(*each) for each in pictures.items())}{_tabulate_html(table)}
<p>Read the predictions with</p><pre>{html.escape(report.read_with)}</pre>
{_show("rows done over time", progress)}{_tabulate_html(of_scoring)}</html>
""".encode()


def _show(what: str, picture: bytes) -> str:
    return f'<img alt="{html.escape(what)}" src="{data_uri(picture)}">'


def _tabulate_html(table: Mapping[str, str]) -> str:
    rows = (
        f"<tr><td>{html.escape(name).replace('  ', '&emsp;', 1)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in table.items()
    )
    return f"<table>{''.join(rows)}</table>"


def page_path(plan: Plan) -> str:
    """Return where the page of a run lies below the destination."""
    return f"{plan.folder}/{REPORT}"


def save_page(
    storage: Storage, plan: Plan, report: BatchReport, progress: bytes, pictures: Mapping[str, bytes]
) -> None:
    """Write the page beside the plan; the first one stands."""
    storage.put_new(page_path(plan), page(report, progress, pictures))
