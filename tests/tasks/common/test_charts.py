"""Charts are SVG documents whose lengths are in proportion to what they show."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.common.charts import Panel, arrange_panels, choose_ticks, draw_bars, draw_histogram, draw_line

SVG = "{http://www.w3.org/2000/svg}"


def read(*panels: Panel, columns: int = 1, heading: str = "") -> ET.Element:
    return ET.fromstring(arrange_panels(panels, columns, heading))  # noqa: S314 - written here


def words_of(picture: ET.Element) -> list[str]:
    return [each.text or "" for each in picture.iter(f"{SVG}text")]


def points_of(picture: ET.Element, kind: str) -> list[list[tuple[float, float]]]:
    """The corners of each line or area of a picture."""
    found = [each.attrib["points"].split() for each in picture.iter(f"{SVG}{kind}")]
    return [[(float(x), float(y)) for x, y in (pair.split(",") for pair in pairs)] for pairs in found]


def a_histogram(*series: tuple[str, list[int]]) -> ET.Element:
    counted = [(name, np.array(counts)) for name, counts in series]
    return read(draw_histogram("score", counted, np.linspace(0.0, 1.0, len(series[0][1]) + 1), "a note", 360, 240))


def test_a_bin_is_as_high_as_its_count_and_as_wide_as_the_others() -> None:
    picture = a_histogram(("", [0, 5, 10]))
    (corners,) = points_of(picture, "polygon")
    floor = corners[0][1]
    (_, low), (_, middle), (_, high) = corners[1], corners[3], corners[5]

    assert (0.0, 2.0) == (floor - low, (floor - high) / (floor - middle))
    assert corners[-1][1] == floor
    widths = np.diff([corners[at][0] for at in (1, 3, 5, 7)])
    assert widths == pytest.approx([widths[0]] * 3, abs=0.11)
    assert ["score", "a note", "0", "0.2", "0.4", "0.6", "0.8", "1"] == words_of(picture)


def test_several_series_are_lines_of_their_own_colour_that_a_legend_names() -> None:
    picture = a_histogram(("first", [1, 3]), ("second", [2, 0]))
    lines = [each.attrib["stroke"] for each in picture.iter(f"{SVG}polyline")]
    legend = {group.attrib["fill"]: words_of(group) for group in picture.iter(f"{SVG}g") if "fill" in group.attrib}

    assert 2 == len(set(lines))
    assert {lines[0]: ["first"], lines[1]: ["second"]} == legend
    assert [] == points_of(picture, "polygon")


def test_a_bar_is_as_long_as_its_value_and_has_its_name_and_words() -> None:
    picture = read(
        draw_bars("seconds", [("read", 1.0, "1 s"), ("forward", 4.0, "4 s"), ("write", 0.0, "0 s")], "", 400, 300)
    )
    _, *bars = [float(each.attrib["width"]) for each in picture.iter(f"{SVG}rect")]

    assert (4.0, 0.0) == (pytest.approx(bars[1] / bars[0], abs=0.01), bars[2])
    assert ["seconds", "", "read", "1 s", "forward", "4 s", "write", "0 s"] == words_of(picture)


@pytest.mark.parametrize(("name", "width"), [("n" * 10, 62), ("値" * 10, 124)])
def test_a_bar_begins_behind_its_name(name: str, width: float) -> None:
    picture = read(draw_bars("", [(name, 1.0, "")], "", 400, 300))
    _, bar = picture.iter(f"{SVG}rect")

    assert width + 14 == pytest.approx(float(bar.attrib["x"]))


@pytest.mark.parametrize("bars", [[], [("none", 0.0, "0")]])
def test_bars_of_nothing_are_drawn_too(bars: list[tuple[str, float, str]]) -> None:
    assert "seconds" in words_of(read(draw_bars("seconds", bars, "", 400, 300)))


def test_a_line_goes_through_its_points_up_to_its_limit() -> None:
    picture = read(draw_line("rows", [(0.0, 0), (1.0, 500), (4.0, 1_000)], 1_000, ("seconds", "rows done"), 600, 300))
    ((start, middle, end),) = points_of(picture, "polyline")
    dotted = next(group for group in picture.iter(f"{SVG}g") if "stroke-dasharray" in group.attrib)

    assert 4.0 == pytest.approx((end[0] - start[0]) / (middle[0] - start[0]), abs=0.01)
    assert 2.0 == pytest.approx((start[1] - end[1]) / (start[1] - middle[1]), abs=0.01)
    assert {f"{end[1]:.1f}"} == {dotted[0].attrib["y1"], dotted[0].attrib["y2"]}
    assert {"500", "1,000", "seconds", "rows done"} <= set(words_of(picture))


def test_points_are_marked_where_they_are_few() -> None:
    for points, marks in ((60, 60), (61, 0)):
        picture = read(draw_line("", [(at, at) for at in range(points)], points, ("", ""), 600, 300))

        assert marks == len([*picture.iter(f"{SVG}circle")])


def test_a_run_that_had_all_its_rows_at_once_and_one_without_rows_are_drawn() -> None:
    for rows in (0, 10):
        assert [1] == [
            len(each) for each in points_of(read(draw_line("", [(0.0, rows)], rows, ("", ""), 600, 300)), "polyline")
        ]


def test_panels_stand_in_rows_below_the_heading() -> None:
    panel = Panel(width=100, height=50, elements=("<g/>",))
    picture = read(panel, panel, panel, columns=2, heading="all of them")
    places = [each.attrib["transform"] for each in picture.iter(f"{SVG}g") if "transform" in each.attrib]

    assert ["translate(0 26)", "translate(100 26)", "translate(0 76)"] == places
    assert ("200", "126") == (picture.attrib["width"], picture.attrib["height"])


@given(st.text())
def test_any_words_are_shown_as_they_are_on_one_line(words: str) -> None:
    shown = words_of(read(draw_bars(words, [(words, 1.0, words)], words, 400, 300)))

    assert 4 * [" ".join(re.sub(r"[\x00-\x08\x0e-\x1b\ufffe\uffff]", "\ufffd", words).split())] == shown


@given(st.floats(-1e307, 1e307), st.floats(1e-12, 1e307))
def test_ticks_are_round_numbers_within_the_range_and_few(low: float, span: float) -> None:
    high = low + max(span, 80 * float(np.spacing(abs(low))))
    ticks = choose_ticks(low, high)

    assert 1 <= len(ticks) <= 6
    assert all(low <= tick <= high for tick in ticks)
    assert sorted(set(ticks)) == ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 1_050, [0, 500, 1_000]),
        (-3, 7, [-2, 0, 2, 4, 6]),
        (0, 5e-4, [0, 1e-4, 2e-4, 3e-4, 4e-4, 5e-4]),
    ],
)
def test_ticks_are_one_two_or_five_times_a_power_of_ten_apart(low: float, high: float, ticks: list[float]) -> None:
    assert ticks == pytest.approx(choose_ticks(low, high))
