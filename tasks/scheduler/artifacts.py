"""A decision, and what came of it, among the artifacts of a flow run."""

from __future__ import annotations

from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from tasks.common.artifacts import Logger, server_may_fail
from tasks.common.formatting import data_uri
from tasks.scheduler.decision import Decision
from tasks.scheduler.effect import Applied
from tasks.scheduler.report import alternatives_table, summary
from tasks.scheduler.review import Review


def publish_decision(decision: Decision, words: str, png: bytes, logger: Logger) -> None:
    """Put a decision among the artifacts: markdown, the alternatives as a table, and the plot."""
    with server_may_fail(logger):
        create_markdown_artifact(words, key="mode-decision", description=summary(decision))
        create_table_artifact(alternatives_table(decision), key="mode-alternatives", description=summary(decision))
        create_image_artifact(data_uri(png), key="mode-plot", description="Costs, arrivals, and other traffic")


def publish_applied(applied: Applied, logger: Logger) -> None:
    """Put what was put into effect among the artifacts."""
    with server_may_fail(logger):
        create_markdown_artifact(applied.markdown(), key="mode-applied", description=applied.what)


def publish_review(review: Review, logger: Logger) -> None:
    """Put a review among the artifacts."""
    with server_may_fail(logger):
        create_markdown_artifact(review.markdown(), key="mode-review", description=review.verdict.reason)
