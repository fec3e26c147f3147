"""What a person may say about challengers: what their predictions are held against, and when one is promoted."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from serving.model.contract import Frozen

CHALLENGERS_MAX = 4

LabelKind = Literal["regression", "classification"]
Metric = Literal["mae", "rmse", "accuracy", "log_loss", "auc"]
# Of these the greater one is the better.
GREATER_IS_BETTER: frozenset[Metric] = frozenset({"accuracy", "auc"})


class Labels(Frozen):
    """What the rows turned out to be: a column of the source, or of another table that has the same keys."""

    column: str = Field(min_length=1, description="The column that holds the label of each row; null where unknown.")
    source: str | None = Field(
        default=None,
        min_length=1,
        description="A table of Parquet files, or a Delta table, with the run's key columns and that column. Without: "
        "the run's own source.",
    )
    kind: LabelKind | None = Field(
        default=None,
        description="regression: labels are numbers, as predictions are. classification: labels are classes, and a "
        "prediction is a class, or the probability of true or 1, or a list with one of each class 0, 1, and so on. "
        "Without: regression where labels are numbers and a prediction is one floating-point number.",
    )


class PromoteIf(Frozen):
    """When a challenger takes the champion's alias: where it is better by a metric, over rows that both have scored."""

    metric: Metric = Field(description="What decides: of mae, rmse and log_loss the smaller, else the greater.")
    by: float = Field(ge=0, description="By how much the challenger must be better, in the metric's own unit.")
    alias: str = Field(
        default="champion", min_length=1, description="The alias that moves. It must name the run's model when planned."
    )
    min_rows: int = Field(default=1_000, ge=1, description="The fewest rows with a label that decide.")
    max_more_rejects: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="By how much the challenger's share of rejects may exceed the champion's.",
    )
