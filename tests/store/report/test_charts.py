"""The charts stay small, and are left out where there is nothing to draw."""

from __future__ import annotations

from kvedit.store.report import charts
from kvedit.store.report.scores import Check


def test_nothing_to_draw_is_no_chart() -> None:
    assert charts.growth({0: 0}) == charts.growth({0: 0, 1: 1}) == ""
    assert charts.retention({"generated": []}) == ""
    assert charts.margins([1.0]) == charts.norms([]) == ""


def test_charts_of_many_checks_are_no_larger_than_those_of_some() -> None:
    def chart(count: int) -> str:
        every = [Check(number, number % 5, 5) for number in range(1, count + 1)]
        return charts.retention({"teacher-forced": every, "generated": every})

    some, many = chart(charts.POINTS), chart(100 * charts.POINTS)
    assert abs(len(many) - len(some)) < len(some) / 10
    growth = charts.growth({number: number // 2 for number in range(10_000)})
    assert len(growth) < 200_000


def test_a_chart_is_an_svg_element_and_nothing_else() -> None:
    chart = charts.margins([0.5, 1.0, 2.0])
    assert chart.startswith("<svg") and chart.rstrip().endswith("</svg>")
    assert "<metadata" not in chart and "<!DOCTYPE" not in chart
