"""The charts, as Vega-Lite specifications. Text from runs enters them as data only, never as a
field name or an expression.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from biasshift.report.downsample import DRAWN, LEVELS, Reduced

if TYPE_CHECKING:
    import altair as alt

HEIGHT = 260
# Plain numbers as far as they are short, powers of ten beyond.
_TICK = "datum.value == 0 || (abs(datum.value) >= 1e-4 && abs(datum.value) < 1e6) ? format(datum.value, ',~r') : format(datum.value, '~e')"
# On a log scale the ticks at 1, 2 and 5 alone bear a number: Vega would leave out one of those that
# meet, as often 0.1 as 0.09.
_LOG_TICK = f"indexof([1, 2, 5], round(datum.value / pow(10, floor(log(datum.value) / LN10 + 1e-9)))) >= 0 ? ({_TICK}) : ''"
CURVES = {
    "loss": "curves-loss",
    "error": "curves-error",
}  # metric → its place on the page; the others share one


def charts(found: Reduced) -> dict[str, dict[str, Any]]:
    """Returns place on the page → specification; `found` decides which there are, the data
    themselves are added on the page.
    """
    across = (
        {"heat": heat_map(), "across": across_steps(found), "within": within_cell(found)}
        if found.cells
        else {}
    )
    return _curves(found, log=False) | {place: chart.to_dict() for place, chart in across.items()}


def variants(found: Reduced) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns name of a `<select>` → its value → the charts that take the place of others then.
    Vega-Lite's scales choose no type.
    """
    heat = {"heat": heat_map(compressed=True).to_dict()} if found.cells else {}
    return {"scale": {"log": _curves(found, log=True)}, "colors": {"compressed": heat}}


def _curves(found: Reduced, log: bool) -> dict[str, dict[str, Any]]:
    made = {
        CURVES[name]: learning_curves(found, position, log)
        for position, name in enumerate(found.metrics)
        if name in CURVES
    }
    if set(found.metrics) - set(CURVES):
        made["curves-other"] = learning_curves(found, None, log)
    return {place: chart.to_dict() for place, chart in made.items()}


def theme(found: Reduced, dark: bool) -> dict[str, Any]:
    """Returns the Vega configuration: the page's colors, and those of the series."""
    ink, faint, ground = (
        ("#e6e6e6", "#4a4f57", "#1e2127") if dark else ("#1b1b1b", "#d9d9d9", "#ffffff")
    )
    text = {
        "labelColor": ink,
        "titleColor": ink,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    }
    return {
        "background": ground,
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "autosize": {
            "type": "fit-x",
            "contains": "padding",
            "resize": True,
        },  # other numbers need other room at the axes
        "axis": {**text, "gridColor": faint, "domainColor": faint, "tickColor": faint},
        "text": {"color": ink},
        "legend": {**text, "labelLimit": 300},
        "range": {"category": [one.on_dark if dark else one.color for one in found.series]},
    }


def learning_curves(found: Reduced, metric: int | None, log: bool) -> alt.TopLevelMixin:
    """Mean over runs against step or epoch, with a ribbon of ± SD; training solid, validation
    dashed.

    Mean and SD belong to the scale that is drawn: on a log scale they are those of the logarithm.
    """
    import altair as alt

    chosen = (
        alt.param("metric", bind=alt.BindDirect(element="#metric"))
        if metric is None
        else alt.param("metric", value=metric)
    )
    against = alt.param("against", bind=alt.BindDirect(element="#against"))
    rows = _with_labels(
        alt.Chart(alt.NamedData("curves")).transform_filter("datum.metric == metric")
    )
    rows = rows.transform_calculate(
        x="against == 'epoch' ? datum.epoch : datum.step"
    ).transform_filter("isValid(datum.x)")
    look = alt.Scale(domain=["train", "valid", "test", ""], range=[[1, 0], [5, 3], [1, 2], [1, 0]])
    dash = alt.StrokeDash(
        "split:N", scale=look, legend=None
    )  # the page says it; on a narrow screen a legend would be cut
    tooltip = [
        "label:N",
        "split:N",
        "step:Q",
        "epoch:Q",
        alt.Tooltip("mean:Q", format=".4~g"),
        alt.Tooltip("sd:Q", format=".3~g"),
        "n:Q",
    ]
    x = alt.X("x:Q", title="step or epoch, as chosen").scale(nice=False)
    return _lines_and_ribbons(
        found, rows, x, "mean over runs, ± SD", dash, tooltip, dots=metric is None, log=log
    ).add_params(chosen, against)


def heat_map(compressed: bool = False) -> alt.TopLevelMixin:
    """Layer × step of one quantity and one series. A click on a cell chooses its layer and step for
    the other charts.

    Args:
        compressed: colors linear in the value up to the tenth percentile of its size, and in its
            logarithm beyond.
    """
    import altair as alt

    cell = alt.selection_point(name="cell", fields=["l", "s"], toggle=False, empty=False)
    rows = alt.Chart(alt.NamedData("cells")).transform_filter(
        "datum.q == quantity && datum.g == series && datum.l >= 0"
    )
    rows = rows.transform_lookup("l", alt.LookupData(alt.NamedData("layers"), "l", ["layer"]))
    rows = rows.transform_lookup(
        "q", alt.LookupData(alt.NamedData("ranges"), "q", ["least", "most", "small"])
    )
    rows = rows.transform_calculate(
        color="clamp(datum.mean, datum.least, datum.most)"
        + (" / datum.small" if compressed else ""),
        median=f"datum.d[{LEVELS.index(50)}]",
    )
    rows = rows.transform_calculate(
        low=f"datum.d[{LEVELS.index(5)}]", high=f"datum.d[{LEVELS.index(95)}]"
    )
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
    scale = (
        alt.Scale(scheme="viridis", type="symlog", constant=1)
        if compressed
        else alt.Scale(scheme="viridis", zero=False)
    )
    ticks = (
        _TICK.replace("datum.value", "(datum.value * data('ranges')[quantity].small)").replace(
            ",~r", ".2~r"
        )
        if compressed
        else _TICK
    )
    encoded = rows.mark_rect(cursor="pointer").encode(
        x=alt.X("s:O", title="step", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
        y=alt.Y(
            "layer:N",
            title="layer",
            sort=alt.EncodingSortField("l", op="min"),
            axis=alt.Axis(labelLimit=120),
        ),
        color=alt.Color("color:Q", title=None, scale=scale).legend(
            orient="top", gradientLength=220, labelExpr=ticks
        ),
        stroke=alt.condition(chosen, alt.value("#ff2d55"), alt.value(None)),
        strokeWidth=alt.condition(chosen, alt.value(2.5), alt.value(0)),
        tooltip=tooltip,
    )
    return encoded.properties(width="container", height=HEIGHT).add_params(
        cell, *_bound("quantity", "series", "layer", "step")
    )


def across_steps(found: Reduced) -> alt.TopLevelMixin:
    """One quantity of one layer against the step, a line for each series: the comparison of the
    activation functions.
    """
    import altair as alt

    rows = _with_labels(
        alt.Chart(alt.NamedData("cells")).transform_filter(
            "datum.q == quantity && datum.l == layer"
        )
    )
    tooltip = [
        "label:N", alt.Tooltip("s:Q", title="step"), alt.Tooltip("mean:Q", format=".4~g"), alt.Tooltip("sd:Q", format=".3~g"), "runs:Q",
    ]  # fmt: skip
    x = alt.X("s:Q", title="step").scale(nice=False)
    return _lines_and_ribbons(
        found, rows, x, "median over units, ± SD", None, tooltip, dots=True
    ).add_params(*_bound("quantity", "layer"))


def within_cell(found: Reduced) -> alt.TopLevelMixin:
    """The distribution over units and runs at one layer and step, a line for each series: share of
    values at or below x.
    """
    import altair as alt

    rows = alt.Chart(alt.NamedData("cells")).transform_filter(
        "datum.q == quantity && datum.l == layer && datum.s == step"
    )
    said = "format(datum.beyond, ',') + ' of ' + format(datum.n, ',') + ' values beyond the axis'"
    said = rows.transform_aggregate(beyond="sum(beyond)", n="sum(n)").transform_calculate(said=said)
    said = said.mark_text(align="left", baseline="bottom", x=0, y=-8).encode(text="said:N")
    rows = (
        _with_labels(rows)
        .transform_calculate(percent=str(list(LEVELS)))
        .transform_flatten(["d", "percent"], ["value", "percent"])
    )
    rows = rows.transform_filter(
        f"indexof({list(DRAWN)}, datum.percent) >= 0 && datum.value >= datum.low && datum.value <= "
        "datum.high"
    )
    lines = rows.mark_line(point=alt.OverlayMarkDef(size=45)).encode(
        x=alt.X("value:Q", title="value", scale=alt.Scale(zero=False, nice=False), axis=alt.Axis(labelExpr=_TICK)),
        y=alt.Y("percent:Q", title="% of units at or below", scale=alt.Scale(domain=[0, 100])),
        order="percent:Q",
        color=_color(found),
        tooltip=[
            "label:N", alt.Tooltip("percent:Q", title="%"), alt.Tooltip("value:Q", format=".3~g"), alt.Tooltip("n:Q", title="values"),
            alt.Tooltip("beyond:Q", title="of them beyond the axis"), "runs:Q",
        ],
    )  # fmt: skip
    return (
        alt.layer(lines, said)
        .properties(width="container", height=HEIGHT)
        .add_params(*_bound("quantity", "layer", "step"))
    )


# -- parts -----------------------------------------------------------------------------------------


def _bound(*names: str) -> list[Any]:
    """Parameters that follow the page's `<select>` of the same name."""
    import altair as alt

    return [alt.param(name, bind=alt.BindDirect(element=f"#{name}")) for name in names]


def _with_labels(chart: alt.Chart) -> alt.Chart:
    import altair as alt

    return chart.transform_lookup("g", alt.LookupData(alt.NamedData("labels"), "g", ["label"]))


def _color(found: Reduced) -> alt.Color:
    import altair as alt

    columns = (
        2 if all(len(one.label) < 18 for one in found.series) else 1
    )  # or a narrow screen cuts them
    # "category" is the theme's: the colors follow light and dark.
    scale = alt.Scale(domain=[one.label for one in found.series], range="category")
    return alt.Color("label:N", title=None, scale=scale).legend(
        orient="bottom", columns=columns, symbolType="square", symbolStrokeWidth=0, symbolOpacity=1
    )


def _lines_and_ribbons(
    found: Reduced,
    rows: alt.Chart,
    x: alt.X,
    title: str,
    dash: Any,
    tooltip: list[Any],
    dots: bool,
    log: bool = False,
) -> Any:
    import altair as alt

    if log:
        rows = rows.transform_filter("isValid(datum.log)").transform_calculate(
            y="pow(10, datum.log)",
            low="pow(10, datum.log - (datum.log_sd || 0))",
            high="pow(10, datum.log + (datum.log_sd || 0))",
        )
    else:
        rows = rows.transform_calculate(
            y="datum.mean", low="datum.mean - (datum.sd || 0)", high="datum.mean + (datum.sd || 0)"
        )
    color, detail = _color(found), [] if dash is None else ["split:N"]
    look = {
        "title": title,
        "scale": alt.Scale(type="log") if log else alt.Scale(zero=False),
        "axis": alt.Axis(labelExpr=_LOG_TICK if log else _TICK),
    }
    ribbons = rows.mark_area(opacity=0.18).encode(
        x=x, y=alt.Y("low:Q", **look), y2="high:Q", color=color, detail=detail
    )
    lines = rows.mark_line(strokeWidth=2).encode(
        x=x, y=alt.Y("y:Q", **look), color=color, detail=detail
    )
    lines = lines if dash is None else lines.encode(strokeDash=dash)
    points = rows.mark_point(size=45, filled=True, opacity=1 if dots else 0)
    points = points.encode(x=x, y=alt.Y("y:Q", **look), color=color, tooltip=tooltip)
    return alt.layer(ribbons, lines, points).properties(width="container", height=HEIGHT)
