"""What a person may say about the gate before the manifest: its rules, and the baseline that a run is held against."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from serving.model.contract import ColumnNames, Frozen
from tasks.batch.gate_expression import check_condition

Severity = Literal["refuse", "warn"]


class _Rule(Frozen):
    severity: Severity = Field(
        default="warn",
        description="refuse: a run that breaks the rule is not published until somebody approves it. warn: it is "
        "published, and told.",
    )


class ColumnRule(_Rule):
    """What rules about columns have in common."""

    columns: ColumnNames = Field(
        default=("*",), description="The columns it is for, by name or by pattern such as amount_*."
    )
    side: Literal["inputs", "outputs", "both"] = Field(
        default="both", description="Whether it is for columns that the model reads, or for its predictions, or both."
    )


class NullRateRule(ColumnRule):
    """The share of nulls and NaN of a column."""

    kind: Literal["null_rate"] = Field(default="null_rate", description="Tells this rule from others.")
    max_change: float = Field(
        default=0.1, ge=0, le=1, description="By how much the share of nulls and NaN may differ from the baseline's."
    )


class PsiRule(ColumnRule):
    """The population stability index of a column."""

    kind: Literal["psi"] = Field(default="psi", description="Tells this rule from others.")
    max_psi: float = Field(
        default=0.25,
        gt=0,
        description="The greatest population stability index. By convention 0.1 is a small change, 0.25 a large one.",
    )


class KsRule(ColumnRule):
    """The Kolmogorov-Smirnov distance of a column."""

    kind: Literal["ks"] = Field(default="ks", description="Tells this rule from others.")
    max_ks: float = Field(
        default=0.2, gt=0, le=1, description="The greatest distance of the two distribution functions, from 0 to 1."
    )


class MeanShiftRule(ColumnRule):
    """The mean of a column."""

    kind: Literal["mean_shift"] = Field(default="mean_shift", description="Tells this rule from others.")
    max_deviations: float = Field(
        default=0.5, gt=0, description="By how many of the baseline's standard deviations the mean may move."
    )


class RangeRule(ColumnRule):
    """The range of a column; of a text, of its lengths."""

    kind: Literal["range"] = Field(default="range", description="Tells this rule from others.")
    minimum: float | None = Field(
        default=None, description="The least value allowed. Without either bound: by the baseline's range."
    )
    maximum: float | None = Field(
        default=None, description="The greatest value allowed. Without either bound: by the baseline's range."
    )
    slack: float = Field(
        default=1.0,
        ge=0,
        description="Where no bound is given, how far values may lie outside the baseline's range, in widths of it.",
    )


class RowCountRule(_Rule):
    """How many rows the run has."""

    kind: Literal["row_count"] = Field(default="row_count", description="Tells this rule from others.")
    max_change: float | None = Field(
        default=0.5, ge=0, description="By what share of the baseline's rows the number of rows may differ."
    )
    min_rows: int | None = Field(default=None, ge=0, description="The fewest rows, whatever the baseline has.")


class RejectRateRule(_Rule):
    """How many rows have no prediction."""

    kind: Literal["reject_rate"] = Field(default="reject_rate", description="Tells this rule from others.")
    max_change: float | None = Field(
        default=0.05, ge=0, le=1, description="By how much the share of rejects may exceed the baseline's."
    )
    max_rate: float | None = Field(
        default=None, ge=0, le=1, description="The greatest share of rejects, whatever the baseline has."
    )


class ExpressionRule(ColumnRule):
    """A condition of one's own on the statistics of a column."""

    kind: Literal["expression"] = Field(default="expression", description="Tells this rule from others.")
    condition: str = Field(
        min_length=1,
        max_length=1000,
        description="What must be true of each column, as SQL over its statistics, such as "
        "mean BETWEEN 0 AND 1 AND p99 < 2 * baseline_p99. A column of which it says nothing (null) is not judged.",
    )

    @field_validator("condition")
    @classmethod
    def _is_condition(cls, value: str) -> str:
        check_condition(value)
        return value


AnyColumnRule = NullRateRule | PsiRule | KsRule | MeanShiftRule | RangeRule | ExpressionRule
Rule = Annotated[AnyColumnRule | RowCountRule | RejectRateRule, Field(discriminator="kind")]

DEFAULT_RULES: tuple[Rule, ...] = (
    RowCountRule(severity="refuse"),
    RejectRateRule(severity="refuse"),
    NullRateRule(severity="refuse"),
    MeanShiftRule(severity="refuse", side="outputs", max_deviations=1.0),
    PsiRule(),
    RangeRule(),
)


class LastRun(Frozen):
    """The run of the same destination that was published last."""

    kind: Literal["last_run"] = Field(default="last_run", description="Tells this baseline from others.")


class NamedRun(Frozen):
    """A published run of the same destination."""

    kind: Literal["run"] = Field(default="run", description="Tells this baseline from others.")
    run: str = Field(min_length=1, description="The run's key or name, as `overnight runs` lists it.")


class StatisticsFile(Frozen):
    """Statistics of any table, such as the training set, in a file."""

    kind: Literal["file"] = Field(default="file", description="Tells this baseline from others.")
    address: str = Field(min_length=1, description="A path or address of the JSON that describe_table's result gives.")


class TrainingSet(Frozen):
    """What the model was trained on, as its MLflow run has logged it."""

    kind: Literal["training_set"] = Field(default="training_set", description="Tells this baseline from others.")
    dataset: str | None = Field(
        default=None,
        min_length=1,
        description="The name of the dataset in MLflow, where the model's run has logged several for training.",
    )


Baseline = Annotated[LastRun | NamedRun | StatisticsFile | TrainingSet, Field(discriminator="kind")]


class Gate(Frozen):
    """What a run is held against before it is published."""

    baseline: Baseline = Field(default=LastRun(), description="Whose statistics a run is held against.")
    rules: tuple[Rule, ...] = Field(default=DEFAULT_RULES, description="What must hold, each a warning or a refusal.")
    on_refusal: Literal["fail", "pause"] = Field(
        default="fail",
        description="What a run does that breaks a rule which refuses it. fail: it ends, unpublished. pause: it asks "
        "for approval in Prefect, and is published once it has it; else it ends, unpublished.",
    )
    pause_hours: float = Field(
        default=24.0, gt=0, le=720, description="Hours that a run which asks for approval waits for the answer."
    )
