"""The charts of the page, as Vega-Lite specifications.

Text from runs enters a chart as data only, never as the name of a field or in an expression. The
charts name their data ("curves", "cells", "labels", "layers", "ranges"); the page holds them once.
"""

from typing import Any

import altair as alt

from biasshift.report.downsample import DRAWN, LEVELS, ChartData

HEIGHT = 260
# Plain numbers as far as they are short, powers of ten beyond.
_TICK = (
    "datum.value == 0 || (abs(datum.value) >= 1e-4 && abs(datum.value) < 1e6) "
    "? format(datum.value, ',~r') : format(datum.value, '~e')"
)
# On a log scale only the ticks at 1, 2 and 5 bear a number: of numbers that meet, Vega would leave
# out any, as often 0.1 as 0.09.
_LOG_TICK = (
    "indexof([1, 2, 5], round(datum.value / pow(10, floor(log(datum.value) / LN10 + 1e-9)))) >= 0 "
    f"? ({_TICK}) : ''"
)
# The ticks of compressed colors are in units of the quantity's small value.
_COMPRESSED_TICK = _TICK.replace(
    "datum.value", "(datum.value * data('ranges')[quantity].small)"
).replace(",~r", ".2~r")
CURVES = {"loss": "curves-loss", "error": "curves-error"}  # metric → place; others share a chart


def charts(data: ChartData) -> dict[str, dict[str, Any]]:
    """Returns the specification of every chart, by the id of its place on the page.

    Charts of which there are no data are left out. The data themselves are added on the page.
    """
    specifications = _curves(data, log=False)
    if data.cells:
        specifications |= {
            "heat": heat_map().to_dict(validate=False),
            "across": across_steps(data).to_dict(validate=False),
            "within": within_cell(data).to_dict(validate=False),
        }
    return specifications


def variants(data: ChartData) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the charts that take the place of others: id of a ``<select>`` → its value → charts.

    The type of a scale cannot follow a parameter in Vega-Lite, so each type is a chart of its own.
    """
    heat = {"heat": heat_map(compressed=True).to_dict(validate=False)} if data.cells else {}
    return {"scale": {"log": _curves(data, log=True)}, "colors": {"compressed": heat}}


def _curves(data: ChartData, log: bool) -> dict[str, dict[str, Any]]:
    charts = {
        CURVES[name]: learning_curves(data, position, log)
        for position, name in enumerate(data.metrics)
        if name in CURVES
    }
    if set(data.metrics) - set(CURVES):
        charts["curves-other"] = learning_curves(data, None, log)
    return {place: chart.to_dict(validate=False) for place, chart in charts.items()}


def theme(data: ChartData, dark: bool) -> dict[str, Any]:
    """Returns the configuration of Vega: the colors of the page and those of the groups of runs."""
    ink, faint, background = (
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
        "background": background,
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        # "resize": other numbers need other room at the axes.
        "autosize": {"type": "fit-x", "contains": "padding", "resize": True},
        "axis": {**text, "gridColor": faint, "domainColor": faint, "tickColor": faint},
        "text": {"color": ink},
        "legend": {**text, "labelLimit": 300},
        "range": {"category": [group.on_dark if dark else group.color for group in data.groups]},
    }


# -- one function a chart --------------------------------------------------------------------------


def learning_curves(data: ChartData, metric: int | None, log: bool) -> alt.TopLevelMixin:
    """Returns the chart of means over runs against step or epoch, with ribbons of ± SD.

    Training is solid, validation dashed, test dotted. Mean and SD belong to the scale that is
    drawn: on a log scale they are those of the logarithm.

    Args:
        metric: The position of the metric in ``data.metrics``; None follows the page's choice.
    """
    choices = _bound("metric") if metric is None else [alt.param("metric", value=metric)]
    rows = _with(_rows("curves", "datum.metric == metric"), "labels", "g", "label")
    rows = rows.transform_calculate(x="against == 'epoch' ? datum.epoch : datum.step")
    rows = rows.transform_filter("isValid(datum.x)")
    looks = alt.Scale(domain=["train", "valid", "test", ""], range=[[1, 0], [5, 3], [1, 2], [1, 0]])
    # Without a legend, which a narrow screen would cut: the page says it in words.
    dash = alt.StrokeDash("split:N", scale=looks, legend=None)
    tooltip = [
        "label:N",
        "split:N",
        "step:Q",
        "epoch:Q",
        alt.Tooltip("mean:Q", format=".4~g"),
        alt.Tooltip("sd:Q", format=".3~g"),
        "n:Q",
    ]
    axis = alt.X("x:Q", title="step or epoch, as chosen").scale(nice=False)
    return _lines_and_ribbons(
        data, rows, axis, "mean over runs, ± SD", dash, tooltip, dots=metric is None, log=log
    ).add_params(*choices, *_bound("against"))


def heat_map(compressed: bool = False) -> alt.TopLevelMixin:
    """Returns the chart of layers against steps, for one quantity and one group of runs.

    A click on a cell chooses its layer and step for the other charts.

    Args:
        compressed: Colors are linear up to the tenth percentile of the absolute values, and
            logarithmic beyond.
    """
    cell = alt.selection_point(name="cell", fields=["l", "s"], toggle=False, empty=False)
    rows = _rows("cells", "datum.q == quantity && datum.g == series && datum.l >= 0")
    rows = _with(rows, "layers", "l", "layer")
    rows = _with(rows, "ranges", "q", "least", "most", "small").transform_calculate(
        color=f"clamp(datum.mean, datum.least, datum.most){' / datum.small' * compressed}",
        median=f"datum.d[{LEVELS.index(50)}]",
        low=f"datum.d[{LEVELS.index(5)}]",
        high=f"datum.d[{LEVELS.index(95)}]",
    )
    tooltip = [
        alt.Tooltip("layer:N"),
        alt.Tooltip("s:Q", title="step"),
        alt.Tooltip("mean:Q", title="mean over runs of the median over units", format=".4~g"),
        alt.Tooltip("sd:Q", title="SD over runs", format=".3~g"),
        alt.Tooltip("runs:Q"),
        alt.Tooltip("n:Q", title="values (units × runs)"),
        alt.Tooltip("low:Q", title="5 % of values below", format=".3~g"),
        alt.Tooltip("median:Q", title="median of values", format=".3~g"),
        alt.Tooltip("high:Q", title="95 % of values below", format=".3~g"),
    ]
    scale = alt.Scale(scheme="viridis", type="symlog", constant=1)
    scale = scale if compressed else alt.Scale(scheme="viridis", zero=False)
    by_depth = alt.EncodingSortField("l", op="min")
    chosen = "datum.l == layer && datum.s == step"
    encoded = rows.mark_rect(cursor="pointer").encode(
        x=alt.X("s:O", title="step", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
        y=alt.Y("layer:N", title="layer", sort=by_depth, axis=alt.Axis(labelLimit=120)),
        color=alt.Color("color:Q", title=None, scale=scale).legend(
            orient="top", gradientLength=220, labelExpr=_COMPRESSED_TICK if compressed else _TICK
        ),
        stroke=alt.condition(chosen, alt.value("#ff2d55"), alt.value(None)),
        strokeWidth=alt.condition(chosen, alt.value(2.5), alt.value(0)),
        tooltip=tooltip,
    )
    return encoded.properties(width="container", height=HEIGHT).add_params(
        cell, *_bound("quantity", "series", "layer", "step")
    )


def across_steps(data: ChartData) -> alt.TopLevelMixin:
    """Returns the chart of one quantity of one layer against the step, a line for each group.

    Here the activation functions are compared.
    """
    rows = _rows("cells", "datum.q == quantity && datum.l == layer")
    rows = _with(rows, "labels", "g", "label")
    tooltip = [
        "label:N",
        alt.Tooltip("s:Q", title="step"),
        alt.Tooltip("mean:Q", format=".4~g"),
        alt.Tooltip("sd:Q", format=".3~g"),
        "runs:Q",
    ]
    axis = alt.X("s:Q", title="step").scale(nice=False)
    return _lines_and_ribbons(
        data, rows, axis, "median over units, ± SD", None, tooltip, dots=True
    ).add_params(*_bound("quantity", "layer"))


def within_cell(data: ChartData) -> alt.TopLevelMixin:
    """Returns the chart of a distribution over units and runs, at one layer and step.

    A line for each group: the share of values at or below x. Above it stands how many values lie
    beyond the axis, which does not follow long tails.
    """
    rows = _rows("cells", "datum.q == quantity && datum.l == layer && datum.s == step")
    text = "format(datum.beyond, ',') + ' of ' + format(datum.n, ',') + ' values beyond the axis'"
    sums = rows.transform_aggregate(beyond="sum(beyond)", n="sum(n)").transform_calculate(text=text)
    beyond = sums.mark_text(align="left", baseline="bottom", x=0, y=-8).encode(text="text:N")
    rows = (
        _with(rows, "labels", "g", "label")
        .transform_calculate(percent=str(list(LEVELS)))
        .transform_flatten(["d", "percent"], ["value", "percent"])
        .transform_filter(
            f"indexof({list(DRAWN)}, datum.percent) >= 0 "
            "&& datum.value >= datum.low && datum.value <= datum.high"
        )
    )
    x = alt.X("value:Q", title="value").scale(zero=False, nice=False).axis(labelExpr=_TICK)
    y = alt.Y("percent:Q", title="% of units at or below").scale(domain=[0, 100])
    lines = rows.mark_line(point=alt.OverlayMarkDef(size=45)).encode(
        x=x,
        y=y,
        order="percent:Q",
        color=_color(data),
        tooltip=[
            "label:N",
            alt.Tooltip("percent:Q", title="%"),
            alt.Tooltip("value:Q", format=".3~g"),
            alt.Tooltip("n:Q", title="values"),
            alt.Tooltip("beyond:Q", title="of them beyond the axis"),
            "runs:Q",
        ],
    )
    layered = alt.layer(lines, beyond).properties(width="container", height=HEIGHT)
    return layered.add_params(*_bound("quantity", "layer", "step"))


# -- what charts share -----------------------------------------------------------------------------


def _rows(name: str, where: str) -> alt.Chart:
    """A chart of the page's data of that name, of the rows for which an expression holds."""
    return alt.Chart(alt.NamedData(name)).transform_filter(where)


def _with(chart: alt.Chart, name: str, key: str, *fields: str) -> alt.Chart:
    """With the fields of other data of the page, where they have the same key."""
    return chart.transform_lookup(key, alt.LookupData(alt.NamedData(name), key, list(fields)))


def _bound(*names: str) -> list[Any]:
    """Parameters that follow the page's `<select>` of the same name."""
    return [alt.param(name, bind=alt.BindDirect(element=f"#{name}")) for name in names]


def _color(data: ChartData) -> alt.Color:
    labels = [group.label for group in data.groups]
    # "category" is the theme's: the colors follow light and dark.
    scale = alt.Scale(domain=labels, range="category")
    return alt.Color("label:N", title=None, scale=scale).legend(
        orient="bottom",
        columns=2
        if all(len(label) < 18 for label in labels)
        else 1,  # or a narrow screen cuts them
        symbolType="square",
        symbolStrokeWidth=0,
        symbolOpacity=1,
    )


def _lines_and_ribbons(
    data: ChartData,
    rows: alt.Chart,
    x: alt.X,
    title: str,
    dash: alt.StrokeDash | None,
    tooltip: list[Any],
    dots: bool,
    log: bool = False,
) -> Any:
    """Lines, ribbons of ± SD around them, and points, which are invisible without `dots` and bear
    the tooltips.
    """
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
    scale = alt.Scale(type="log") if log else alt.Scale(zero=False)
    look = {"title": title, "scale": scale, "axis": alt.Axis(labelExpr=_LOG_TICK if log else _TICK)}
    color, y, detail = _color(data), alt.Y("y:Q", **look), [] if dash is None else ["split:N"]
    ribbons = rows.mark_area(opacity=0.18).encode(
        x=x, y=alt.Y("low:Q", **look), y2="high:Q", color=color, detail=detail
    )
    lines = rows.mark_line(strokeWidth=2).encode(x=x, y=y, color=color, detail=detail)
    lines = lines if dash is None else lines.encode(strokeDash=dash)
    points = rows.mark_point(size=45, filled=True, opacity=1 if dots else 0)
    points = points.encode(x=x, y=y, color=color, tooltip=tooltip)
    return alt.layer(ribbons, lines, points).properties(width="container", height=HEIGHT)
