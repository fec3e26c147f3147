"""Promotion: an alias moves from the model of a run to a challenger where a rule holds and nobody has moved it."""

from __future__ import annotations

from mlflow import MlflowClient, MlflowException

from serving.errors import BadInput, ModelNotFound
from serving.model.pin import ModelPin
from tasks.batch.challenger_rules import PromoteIf
from tasks.batch.comparison import Promotion, RunComparison, judge_promotion
from tasks.batch.plan import Plan


def check_alias(champion: ModelPin, rule: PromoteIf) -> None:
    """Raise BadInput where the alias that may move does not name the model of a run that is to be planned."""
    version = read_alias(champion.name, rule.alias)
    if version != champion.version:
        message = (
            f"The alias {rule.alias!r} of {champion.name!r} must name version {champion.version}, which the run scores "
            f"by, where promote_if is given; it names {f'version {version}' if version else 'none'}. Set it, score "
            f"models:/{champion.name}@{rule.alias}, or leave promote_if out."
        )
        raise BadInput(message)


def read_alias(name: str, alias: str) -> str | None:
    """Return the version that an alias names in the registry now, None where there is no such alias.

    Raises ModelNotFound where the registry does not answer.
    """
    try:
        aliases = dict(MlflowClient().get_registered_model(name).aliases)
    except MlflowException as error:
        message = f"The registry must say which version {name}@{alias} is, got: {error}. Check MLFLOW_TRACKING_URI."
        raise ModelNotFound(message) from None
    return str(aliases[alias]) if alias in aliases else None


def promote(plan: Plan, comparison: RunComparison, rule: PromoteIf) -> Promotion:
    """Move an alias to the best challenger that a rule holds for, and say what was done and why.

    The alias is read just before it is moved: where it names another version than the model of the run, it stays. The
    registry has no operation that does both at once. Called again, it changes nothing.

    Args:
        plan: The plan of the run.
        comparison: Its challengers beside its model.
        rule: The rule.
    """
    pin = plan.model
    told = {"alias": f"{pin.name}@{rule.alias}", "model": pin.uri}
    judged = [(each, *judge_promotion(rule, each, plan.rows)) for each in comparison.challengers]
    best, margin, why = max(judged, key=lambda each: each[1])
    if margin < 0:
        reasons = "; ".join(text for _, _, text in judged)
        return Promotion(outcome="not promoted", **told, why=f"{reasons}.")
    version = best.model.rpartition("/")[2]
    try:
        current = read_alias(pin.name, rule.alias)
        if current == version:
            return Promotion(outcome="promoted", **told, to=best.model, why=f"{why}. The alias names it already.")
        if current != pin.version:
            now = f"names version {current}" if current else "is gone"
            return Promotion(
                outcome="not promoted", **told, why=f"{why}. But the alias {now} by now: somebody has moved it since."
            )
        MlflowClient().set_registered_model_alias(pin.name, rule.alias, version)
    except (MlflowException, ModelNotFound) as error:
        return Promotion(outcome="not promoted", **told, why=f"{why}. But the registry refuses: {str(error)[:300]}")
    return Promotion(outcome="promoted", **told, to=best.model, why=f"{why}.")
