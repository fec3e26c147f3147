"""A comparison as a person reads it: lines of a report, rows of a table, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.batch.comparison import ChallengerComparison, LabelComparison, OutputComparison, Promotion
from tasks.common.formatting import encode_png, shorten_label
from tasks.common.names import describe_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _CHAMPION, _CHALLENGERS = "#1f2933", "#9fb3c8", ("#c2571a", "#2f6f9f", "#5b8c3a", "#8a4f9e")
_BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
_SEGMENTS_SHOWN, _LABEL_MAX, _TITLE_MAX = 12, 18, 90


def describe_challenger(compared: ChallengerComparison) -> dict[str, str]:
    """Return a challenger as lines of a report: what it is, then its figures, each below it."""
    title = f"challenger {describe_model(compared.model)}"
    if compared.given_up is not None:
        return {title: f"given up: {compared.given_up.splitlines()[0]}"}
    if compared.not_compared is not None:
        return {title: f"not compared: {compared.not_compared.splitlines()[0]}"}
    first = compared.outputs[0]
    told = [f"{compared.rows:,} rows compared", *_describe_output(first), *_describe_labels(compared.labels)]
    lines = {title: "; ".join(told)}
    for output in compared.outputs[1:]:
        lines[f"  {title}: {output.output}"] = "; ".join(_describe_output(output))
    lines[f"  {title}: rejects"] = (
        f"{compared.rejects_challenger_only:,} of it alone, {compared.rejects_champion_only:,} of the model alone, "
        f"{compared.rejects_both:,} of both"
    )
    return lines


def _describe_labels(labels: LabelComparison | None) -> list[str]:
    if labels is None:
        return []
    figures = [
        f"{name} {value:.6g}, the model {labels.champion.get(name, float('nan')):.6g}"
        for name, value in labels.challenger.items()
    ]
    return [f"by {labels.rows:,} labels: {', '.join(figures) or 'nothing can be told'}"]


def _describe_output(output: OutputComparison) -> list[str]:
    told = [f"{_share(output.equal, output.rows)} equal"]
    if output.equal_class is not None:
        told.append(f"{_share(output.equal_class, output.rows)} of the same class")
    if output.difference_mean is not None:
        told.append(f"differences {output.difference_mean:.4g} on average, {output.difference_max:.4g} at most")
    if output.rows_decile_changed is not None:
        told.append(f"{_share(output.rows_decile_changed, output.rows)} in another tenth")
    return told


def _share(rows: int, of: int) -> str:
    return f"{100 * rows / of:.3g} %" if of else "none"


def describe_promotion(promotion: Promotion) -> dict[str, str]:
    """Return a promotion as a line of a report."""
    moved = f"to {describe_model(promotion.to)}: " if promotion.to else ""
    return {f"{promotion.outcome}: {promotion.alias}": f"{moved}{promotion.why}"}


def tabulate_comparison(challengers: Sequence[ChallengerComparison]) -> list[dict[str, Any]]:
    """Return the rows of a table: one for each output of each challenger, then one for each of its segments."""
    return [row for compared in challengers for row in (*_list_outputs(compared), *_list_segments(compared))]


def _list_outputs(compared: ChallengerComparison) -> list[dict[str, Any]]:
    name = describe_model(compared.model)
    note = compared.given_up or compared.not_compared
    if note is not None:
        return [{"challenger": name, "of": "given up" if compared.given_up else "not compared", "note": note}]
    metrics = compared.labels.challenger if compared.labels else {}
    ours = {f"model's {each}": value for each, value in (compared.labels.champion if compared.labels else {}).items()}
    return [
        {
            "challenger": name,
            "of": output.output,
            "rows": output.rows,
            "equal": output.equal,
            "mean difference": output.difference_mean,
            "greatest difference": output.difference_max,
            "rows in another tenth": output.rows_decile_changed,
            "rejects of it alone": compared.rejects_challenger_only,
            "rejects of the model alone": compared.rejects_champion_only,
            **metrics,
            **ours,
        }
        for output in compared.outputs
    ]


def _list_segments(compared: ChallengerComparison) -> list[dict[str, Any]]:
    labelled = {(each.column, each.value): each for each in (compared.labels.segments if compared.labels else ())}
    rows = []
    for segment in compared.segments[:_SEGMENTS_SHOWN]:
        found = labelled.get((segment.column, segment.value))
        first = next(iter(segment.equal), "")
        rows.append(
            {
                "challenger": describe_model(compared.model),
                "of": f"{segment.column} = {segment.value}",
                "rows": segment.rows,
                "equal": segment.equal.get(first),
                "mean difference": segment.difference_mean.get(first),
                "rejects of both together": segment.rejects_challenger + segment.rejects_champion,
                **(found.challenger if found else {}),
                **({f"model's {name}": value for name, value in found.champion.items()} if found else {}),
            }
        )
    return rows


def draw_comparison(model: str, challengers: Sequence[ChallengerComparison]) -> bytes | None:
    """Draw each challenger beside the model: how many rows differ by how much, its metrics, and its segments.

    Returns:
        A PNG, or None where nothing was compared.
    """
    shown = [each for each in challengers if each.rows]
    if not shown:
        return None
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second that a finished run does not need

    has_labels = any(each.labels and each.labels.rows for each in shown)
    has_segments = any(each.segments for each in shown)
    panels = 1 + has_labels + has_segments
    figure = Figure(figsize=(0.6 + 4.3 * panels, 3.7), dpi=110, layout="constrained")
    grid: Any = figure.subplots(1, panels, squeeze=False)
    axes = list(grid.flat)
    _draw_differences(axes.pop(0), shown)
    if has_labels:
        _draw_metrics(axes.pop(0), model, shown)
    if has_segments:
        _draw_segments(axes.pop(0), shown)
    for each in grid.flat:
        each.tick_params(labelsize=7)
        each.spines[["top", "right"]].set_visible(False)
    names = ", ".join(describe_model(each.model) for each in shown)
    figure.suptitle(
        shorten_label(f"{describe_model(model)} and {names}", _TITLE_MAX), x=0.01, ha="left", fontsize=10, color=_INK
    )
    return encode_png(figure)


def _draw_differences(axes: Axes, shown: Sequence[ChallengerComparison]) -> None:
    """Draw the share of rows that differ at all, and by more than each of some numbers."""
    for at, compared in enumerate(shown):
        output = compared.outputs[0]
        bounds = ["0", *output.rows_beyond]
        rows = [output.rows - output.equal, *output.rows_beyond.values()]
        shares = [100 * each / output.rows for each in rows]
        width = 0.8 / len(shown)
        places = [place - 0.4 + width * (at + 0.5) for place in range(len(bounds))]
        bars = axes.bar(places, shares, width=width, color=_CHALLENGERS[at % 4], label=describe_model(compared.model))
        if len(shown) == 1:
            axes.bar_label(bars, fmt="%.3g", fontsize=7)
        axes.set_xticks(range(len(bounds)), [f"> {bound}" for bound in bounds])
    axes.set_ylabel("% of the rows", fontsize=8)
    axes.set_ylim(0, 108)
    axes.set_title(f"differences of {shorten_label(shown[0].outputs[0].output, 20)}", loc="left", fontsize=9)
    axes.legend(fontsize=7, frameon=False)


def _draw_metrics(axes: Axes, model: str, shown: Sequence[ChallengerComparison]) -> None:
    """Draw each metric as a share of the model's."""
    labelled = [each for each in shown if each.labels and each.labels.rows]
    names = list(dict.fromkeys(name for each in labelled if each.labels for name in each.labels.challenger))
    width = 0.8 / len(labelled)
    for at, compared in enumerate(labelled):
        if (labels := compared.labels) is None:
            continue
        found = [
            (place, name) for place, name in enumerate(names) if labels.champion.get(name) and name in labels.challenger
        ]
        ratios = [labels.challenger[name] / labels.champion[name] for _, name in found]
        places = [place - 0.4 + width * (at + 0.5) for place, _ in found]
        bars = axes.barh(places, ratios, height=width, color=_CHALLENGERS[at % 4])
        texts = [f"{labels.challenger[name]:.4g} (model {labels.champion[name]:.4g})" for _, name in found]
        axes.bar_label(bars, labels=texts, padding=3, fontsize=7, bbox=_BEHIND_TEXT)
    axes.axvline(1.0, color=_CHAMPION, linewidth=1.4, linestyle="--")
    axes.margins(x=0.75)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"of {shorten_label(describe_model(model), 24)}'s", fontsize=8)
    axes.set_title("by labels", loc="left", fontsize=9)


def _draw_segments(axes: Axes, shown: Sequence[ChallengerComparison]) -> None:
    """Draw the mean difference of numbers, and the share of other rows that differ, by the most frequent segments."""
    is_number = any(each.difference_mean for compared in shown for each in compared.segments)
    first = shown[0].segments[:_SEGMENTS_SHOWN]
    keys = [(each.column, each.value) for each in first]
    width = 0.8 / len(shown)
    for at, compared in enumerate(shown):
        by_key = {(each.column, each.value): each for each in compared.segments}
        found = [(place, by_key[key]) for place, key in enumerate(keys) if key in by_key and by_key[key].rows]
        shares = [
            next(iter(each.difference_mean.values()), 0.0)
            if is_number
            else 100 * (1 - next(iter(each.equal.values()), 0) / each.rows)
            for _, each in found
        ]
        places = [place - 0.4 + width * (at + 0.5) for place, _ in found]
        axes.barh(places, shares, height=width, color=_CHALLENGERS[at % 4])
    axes.set_yticks(range(len(keys)), [shorten_label(f"{column} = {value}", _LABEL_MAX) for column, value in keys])
    axes.invert_yaxis()
    axes.set_xlabel("mean difference" if is_number else "% of the rows that differ", fontsize=8)
    left_out = f", the first {_SEGMENTS_SHOWN}" if len(shown[0].segments) > _SEGMENTS_SHOWN else ""
    axes.set_title(f"segments{left_out}", loc="left", fontsize=9)
