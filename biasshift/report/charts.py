"""The charts, as Vega-Lite specifications. Text from runs enters them as data only, never as a field name or an expression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from biasshift.report.reducing import LEVELS, Reduced

if TYPE_CHECKING:
    import altair as alt

HEIGHT = 260
CURVES = {"loss": "curves-loss", "error": "curves-error"}  # metric → its place on the page; the others share one


def charts(found: Reduced) -> dict[str, dict[str, Any]]:
    """Returns place on the page → specification; `found` decides which there are, the data themselves are added on the page."""
    made: dict[str, alt.TopLevelMixin] = {}
    for position, name in enumerate(found.metrics):
        if name in CURVES:
            made[CURVES[name]] = learning_curves(found, position)
    if set(found.metrics) - set(CURVES):
        made["curves-other"] = learning_curves(found, None)
    if found.cells:
        made |= {"heat": heat_map(), "across": across_steps(found), "within": within_cell(found)}
    return {place: chart.to_dict() for place, chart in made.items()}


def theme(found: Reduced, dark: bool) -> dict[str, Any]:
    """Returns the Vega configuration: the page's colors, and those of the series."""
    ink, faint, ground = ("#e6e6e6", "#4a4f57", "#1e2127") if dark else ("#1b1b1b", "#d9d9d9", "#ffffff")
    text = {"labelColor": ink, "titleColor": ink, "labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal"}
    return {
        "background": ground,
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "axis": {**text, "gridColor": faint, "domainColor": faint, "tickColor": faint},
        "legend": {**text, "labelLimit": 260},
        "range": {"category": [one.on_dark if dark else one.color for one in found.series]},
    }


def learning_curves(found: Reduced, metric: int | None) -> alt.TopLevelMixin:
    """Mean over runs against step or epoch, with a ribbon of ± SD; training solid, validation dashed."""
    import altair as alt

    chosen = alt.param("metric", bind=alt.BindDirect(element="#metric")) if metric is None else alt.param("metric", value=metric)
    against = alt.param("against", bind=alt.BindDirect(element="#against"))
    rows = _with_labels(alt.Chart(alt.NamedData("curves")).transform_filter("datum.metric == metric"))
    rows = rows.transform_calculate(x="against == 'epoch' ? datum.epoch : datum.step").transform_filter("isValid(datum.x)")
    look = alt.Scale(domain=["train", "valid", "test", ""], range=[[1, 0], [5, 3], [1, 2], [1, 0]])
    dash = alt.StrokeDash("split:N", scale=look, legend=None)  # the page says it; on a narrow screen a legend would be cut
    tooltip = ["label:N", "split:N", "step:Q", "epoch:Q", alt.Tooltip("mean:Q", format=".4~g"), alt.Tooltip("sd:Q", format=".3~g"), "n:Q"]
    x = alt.X("x:Q", title="step or epoch, as chosen").scale(nice=False)
    return _lines_and_ribbons(found, rows, x, "mean over runs, ± SD", dash, tooltip, dots=metric is None).add_params(chosen, against)


def heat_map() -> alt.TopLevelMixin:
    """Layer × step of one quantity and one series. A click on a cell chooses its layer and step for the other charts."""
    import altair as alt

    cell = alt.selection_point(name="cell", fields=["l", "s"], toggle=False, empty=False)
    rows = alt.Chart(alt.NamedData("cells")).transform_filter("datum.q == quantity && datum.g == series && datum.l >= 0")
    rows = rows.transform_lookup("l", alt.LookupData(alt.NamedData("layers"), "l", ["layer"]))
    rows = rows.transform_lookup("q", alt.LookupData(alt.NamedData("ranges"), "q", ["least", "most"]))
    rows = rows.transform_calculate(color="clamp(datum.mean, datum.least, datum.most)", median=f"datum.d[{LEVELS.index(50)}]")
    rows = rows.transform_calculate(low=f"datum.d[{LEVELS.index(5)}]", high=f"datum.d[{LEVELS.index(95)}]")
    chosen = "datum.l == layer && datum.s == step"
    tooltip = [
        alt.Tooltip("layer:N"), alt.Tooltip("s:Q", title="step"),
        alt.Tooltip("mean:Q", title="mean over runs of the median over units", format=".4~g"),
        alt.Tooltip("sd:Q", title="SD over runs", format=".3~g"), alt.Tooltip("runs:Q"),
        alt.Tooltip("n:Q", title="values (units × runs)"),
        alt.Tooltip("low:Q", title="5 % of values below", format=".3~g"),
        alt.Tooltip("median:Q", title="median of values", format=".3~g"),
        alt.Tooltip("high:Q", title="95 % of values below", format=".3~g"),
    ]  # fmt: skip
    encoded = rows.mark_rect(cursor="pointer").encode(
        x=alt.X("s:O", title="step", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
        y=alt.Y("layer:N", title="layer", sort=alt.EncodingSortField("l", op="min"), axis=alt.Axis(labelLimit=120)),
        color=alt.Color("color:Q", title=None, scale=alt.Scale(scheme="viridis", zero=False)).legend(
            orient="top", gradientLength=220, format="~g"
        ),
        stroke=alt.condition(chosen, alt.value("#ff2d55"), alt.value(None)),
        strokeWidth=alt.condition(chosen, alt.value(2.5), alt.value(0)),
        tooltip=tooltip,
    )
    return encoded.properties(width="container", height=HEIGHT).add_params(cell, *_bound("quantity", "series", "layer", "step"))


def across_steps(found: Reduced) -> alt.TopLevelMixin:
    """One quantity of one layer against the step, a line for each series: the comparison of the activation functions."""
    import altair as alt

    rows = _with_labels(alt.Chart(alt.NamedData("cells")).transform_filter("datum.q == quantity && datum.l == layer"))
    tooltip = [
        "label:N", alt.Tooltip("s:Q", title="step"), alt.Tooltip("mean:Q", format=".4~g"), alt.Tooltip("sd:Q", format=".3~g"), "runs:Q",
    ]  # fmt: skip
    x = alt.X("s:Q", title="step").scale(nice=False)
    return _lines_and_ribbons(found, rows, x, "median over units: mean over runs, ± SD", None, tooltip, dots=True).add_params(
        *_bound("quantity", "layer")
    )


def within_cell(found: Reduced) -> alt.TopLevelMixin:
    """The distribution over units and runs at one layer and step, a line for each series: share of values at or below x."""
    import altair as alt

    rows = alt.Chart(alt.NamedData("cells")).transform_filter("datum.q == quantity && datum.l == layer && datum.s == step")
    rows = _with_labels(rows).transform_calculate(percent=str(list(LEVELS))).transform_flatten(["d", "percent"], ["value", "percent"])
    lines = rows.mark_line(point=alt.OverlayMarkDef(size=45)).encode(
        x=alt.X("value:Q", title="value", scale=alt.Scale(zero=False), axis=alt.Axis(format="~g")),
        y=alt.Y("percent:Q", title="% of units at or below", scale=alt.Scale(domain=[0, 100])),
        order="percent:Q",
        color=_color(found),
        tooltip=[
            "label:N",
            alt.Tooltip("percent:Q", title="%"),
            alt.Tooltip("value:Q", format=".3~g"),
            alt.Tooltip("n:Q", title="values"),
            "runs:Q",
        ],
    )
    return lines.properties(width="container", height=HEIGHT).add_params(*_bound("quantity", "layer", "step"))


# -- parts -------------------------------------------------------------------------------------------------------


def _bound(*names: str) -> list[Any]:
    """Parameters that follow the page's `<select>` of the same name."""
    import altair as alt

    return [alt.param(name, bind=alt.BindDirect(element=f"#{name}")) for name in names]


def _with_labels(chart: alt.Chart) -> alt.Chart:
    import altair as alt

    return chart.transform_lookup("g", alt.LookupData(alt.NamedData("labels"), "g", ["label"]))


def _color(found: Reduced) -> alt.Color:
    import altair as alt

    columns = 2 if all(len(one.label) < 18 for one in found.series) else 1  # or a narrow screen cuts them
    # "category" is the theme's: the colors follow light and dark.
    scale = alt.Scale(domain=[one.label for one in found.series], range="category")
    return alt.Color("label:N", title=None, scale=scale).legend(
        orient="bottom", columns=columns, symbolType="square", symbolStrokeWidth=0, symbolOpacity=1
    )


def _lines_and_ribbons(found: Reduced, rows: alt.Chart, x: alt.X, title: str, dash: Any, tooltip: list[Any], dots: bool) -> Any:
    import altair as alt

    rows = rows.transform_calculate(low="datum.mean - (datum.sd || 0)", high="datum.mean + (datum.sd || 0)")
    color, detail = _color(found), [] if dash is None else ["split:N"]
    y = alt.Y("mean:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(format="~g"))
    ribbons = rows.mark_area(opacity=0.18).encode(
        x=x, y=alt.Y("low:Q", title=title, axis=alt.Axis(format="~g")), y2="high:Q", color=color, detail=detail
    )
    lines = rows.mark_line(strokeWidth=2).encode(x=x, y=y, color=color, detail=detail)
    lines = lines if dash is None else lines.encode(strokeDash=dash)
    points = rows.mark_point(size=45, filled=True, opacity=1 if dots else 0).encode(x=x, y=y, color=color, tooltip=tooltip)
    return alt.layer(ribbons, lines, points).properties(width="container", height=HEIGHT)
