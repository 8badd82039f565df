"""The report's charts: Vega-Lite specs without data.

Every chart is a template: its data set is called ``source`` and is filled in by the page, so that one spec serves every
data set and embedder, and the same cells serve every panel. Charts hold marks and axes only; titles, legends and
choosers are HTML, and where the height depends on the number of rows the page sets it. Colours are CSS variables
(``var(--model)``), so that light, dark and print need no second spec; UMAPs, drawn on a canvas, use fixed mid-tones.
"""

from functools import cache

import altair as alt

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
KINDS = ["model", "untrained", "baseline", "control", "ceiling"]
SHAPES = ["circle", "circle", "square", "diamond", "triangle-up"]
# Mid-tones, to be told apart on white and on black; the last is for what the others leave over.
CATEGORIES = [
    "#4c86d8", "#e0873a", "#43a35c", "#d05a5f", "#9270ca", "#a3765a", "#d97fb8", "#b0a12c", "#3aa9bd", "#6f7fae",
    "#8fbf5a", "#c24d94", "#c9a06a", "#5d9e8f", "#b57be0", "#7c8a3c", "#e06b8f", "#5aa5e0", "#a8524a",
]  # fmt: skip
OTHER, REST = "all other", "#8b929c"

_SOURCE = alt.NamedData(name="source")
_FIT = alt.AutoSizeParams(type="fit-x", contains="padding")
_KIND = alt.Scale(domain=KINDS, range=[f"var(--{kind})" for kind in KINDS])


def _finish(chart: alt.TopLevelMixin, **more) -> dict:
    spec = chart.properties(data=_SOURCE, width="container", autosize=_FIT, **more).to_dict(validate=True)
    return spec | {"config": CONFIG}


_TEXT = {
    "labelColor": "var(--soft)",
    "titleColor": "var(--soft)",
    "labelFontSize": 12,
    "titleFontSize": 12,
    "titleFontWeight": 400,
}
CONFIG = {
    "background": None,
    "font": "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
    "view": {"stroke": None},
    "axis": _TEXT
    | {
        "domain": False,
        "ticks": False,
        "gridColor": "var(--line)",
        "labelFlush": False,
        "labelPadding": 8,
        "titlePadding": 10,
    },
    "axisY": {"labelColor": "var(--ink)", "labelLimit": 190},
    "text": {"fill": "var(--soft)", "fontSize": 12},
}


@cache
def dots(references: bool) -> dict:
    """Methods with mean, interval and seeds; `references`: controls as dashed lines. Data: `sections._dot_rows`."""
    regime, split, metric = (alt.param(name=name, value="") for name in ("regime", "split", "metric"))
    controls, focus = alt.param(name="controls", value=True), alt.param(name="focus", value="")
    y = alt.Y("label:N", title=None, sort=alt.EncodingSortField(field="order", op="min", order="ascending"))
    x_scale = alt.Scale(zero=False, nice=True, padding=12)
    opacity = alt.condition("focus == '' || datum.kind == focus", alt.value(1), alt.value(0.18))
    colour = alt.Color("kind:N", scale=_KIND, legend=None)
    tooltip = [
        alt.Tooltip("label:N", title="method"),
        alt.Tooltip("kind:N"),
        alt.Tooltip("rank:N", title="rank"),
        alt.Tooltip("text:N", title="mean [95 % interval]"),
        alt.Tooltip("seeds:N"),
        alt.Tooltip("standing:N", title="against the first"),
        alt.Tooltip("cells:Q", format=",", title="cells scored"),
        alt.Tooltip("seen:N", title="seen in pretraining"),
    ]
    base = alt.Chart()
    x = alt.X("mean:Q", title=None, scale=x_scale, axis=alt.Axis(tickCount=6, format=",.4~r"))
    row = base.mark_rect(fill="transparent").encode(y=y, x=alt.value(0), x2=alt.value("width"), tooltip=tooltip)
    lines = (
        base.transform_filter("datum.reference")
        .mark_rule(strokeDash=[2, 3], strokeWidth=1.2)
        .encode(x=x, color=colour, opacity=opacity)
    )
    interval = base.mark_rule(strokeWidth=2.5).encode(
        y=y, x=alt.X("low:Q", scale=x_scale), x2="high:Q", color=colour, opacity=opacity
    )
    seeds = (
        base.transform_flatten(["values"])
        .mark_tick(thickness=1.2, size=11)
        .encode(
            y=y,
            x=alt.X("values:Q", scale=x_scale),
            color=colour,
            opacity=alt.condition("focus == '' || datum.kind == focus", alt.value(0.55), alt.value(0.1)),
        )
    )
    points = base.mark_point(size=75, strokeWidth=2, filled=False).encode(
        y=y,
        x=x,
        color=colour,
        fill=alt.Fill("kind:N", scale=alt.Scale(domain=KINDS, range=[f"var(--{k}-fill)" for k in KINDS]), legend=None),
        shape=alt.Shape("kind:N", scale=alt.Scale(domain=KINDS, range=SHAPES), legend=None),
        opacity=opacity,
        tooltip=tooltip,
    )
    values = base.mark_text(align="left", dx=14, fontSize=12).encode(
        y=y, x=alt.value("width"), text="text:N", opacity=opacity
    )
    values.name = "values"
    chart = (
        alt.layer(row, *([lines] if references else []), interval, seeds, points, values)
        .transform_filter(
            "datum.regime == regime && datum.split == split && datum.metric == metric && (controls || !datum.reference)"
        )
        .add_params(regime, split, metric, controls, focus)
    )
    return _finish(chart, height=200)


@cache
def curves() -> dict:
    """Training curves of every seed; `trivial` is a level. Data: ``step, progress, split, seed, metric, value``."""
    metric, late = alt.param(name="metric", value=""), alt.param(name="late", value=False)
    colour = alt.Color(
        "split:N",
        legend=None,
        scale=alt.Scale(
            domain=["train", "validation", "trivial"], range=["var(--faint)", "var(--model)", "var(--baseline)"]
        ),
    )
    tooltip = [
        "split:N",
        "seed:N",
        alt.Tooltip("step:Q", format=","),
        alt.Tooltip("value:Q", format=".4~g"),
        alt.Tooltip("metric:N"),
    ]
    x = alt.X("step:Q", title="optimiser step", axis=alt.Axis(tickCount=5, grid=False, format="~s"))
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(tickCount=5, format=",.4~r"))
    base = alt.Chart().encode(color=colour, detail="seed:N")
    train = base.transform_filter("datum.split == 'train'").mark_line(strokeWidth=1, opacity=0.75).encode(x=x, y=y)
    held_out = base.transform_filter("datum.split == 'validation'").mark_line(strokeWidth=1.8).encode(x=x, y=y)
    dots = (
        base.transform_filter("datum.split == 'validation'")
        .mark_point(filled=True, size=28, opacity=1)
        .encode(x=x, y=y, tooltip=tooltip)
    )
    trivial = (
        base.transform_filter("datum.split == 'trivial'")
        .mark_rule(strokeDash=[2, 3], strokeWidth=1.2)
        .encode(y=y, tooltip=tooltip)
    )
    hit = (
        base.transform_filter("datum.split == 'train'")
        .mark_point(filled=True, size=60, opacity=0)
        .encode(x=x, y=y, tooltip=tooltip)
    )
    chosen = "datum.metric == metric && (!late || datum.split == 'trivial' || datum.progress >= 0.2)"
    chart = alt.layer(train, trivial, held_out, dots, hit).transform_filter(chosen).add_params(metric, late)
    return _finish(chart, height=190)


def umap(categories: list[str], field: str) -> dict:
    """Cells coloured by `field`. Data: ``x, y`` in [0, 1000], ``label, batch``, and ``*_group``, rare ones joined."""
    focus = alt.param(name="focus", value="")
    named = [name for name in categories if name != OTHER]
    colours = CATEGORIES[: len(named)] + [REST] * (OTHER in categories)
    bounds = alt.Scale(domain=[-20, 1020], nice=False, zero=False)
    chart = (
        alt.Chart()
        .mark_circle(size=7, opacity=0.8)
        .encode(
            x=alt.X("x:Q", axis=None, scale=bounds),
            y=alt.Y("y:Q", axis=None, scale=bounds),
            color=alt.Color(
                f"{field}_group:N",
                legend=None,
                scale=alt.Scale(domain=named + [OTHER] * (OTHER in categories), range=colours),
            ),
            opacity=alt.condition(f"focus == '' || datum.{field}_group == focus", alt.value(0.8), alt.value(0.04)),
            tooltip=["label:N", "batch:N"],
        )
        .add_params(focus)
    )
    return _finish(chart, height=190, padding=0)


def split_bars() -> dict:
    """Cells per data set and split. Data: ``dataset, split, order, cells``."""
    chart = (
        alt.Chart()
        .mark_bar(height=alt.RelativeBandSize(0.6))
        .encode(
            y=alt.Y("dataset:N", title=None, sort=alt.EncodingSortField(field="cells", op="sum", order="descending")),
            x=alt.X("cells:Q", title="cells", axis=alt.Axis(tickCount=5, format=",d")),
            color=alt.Color(
                "split:N",
                legend=None,
                scale=alt.Scale(
                    domain=["train", "validation", "benchmark"],
                    range=["var(--bar)", "var(--bar-deep)", "var(--bar-pale)"],
                ),
            ),
            order=alt.Order("order:Q"),
            tooltip=["dataset:N", "split:N", alt.Tooltip("cells:Q", format=",")],
        )
    )
    return _finish(chart, height=200)


@cache
def histogram(log: bool, thresholds: bool) -> dict:
    """Cells over a QC quantity, kept below removed. Data: ``x0, x1, y0, y1, part``, and rows of ``threshold``."""
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(nice=False, zero=True)
    colour = alt.Color(
        "part:N", legend=None, scale=alt.Scale(domain=["kept", "removed"], range=["var(--bar)", "var(--removed)"])
    )
    axis = alt.Axis(grid=False, tickCount=4, format="~s" if log else ".0%")
    bars = (
        alt.Chart()
        .transform_filter("isValid(datum.x0)")
        .mark_bar()
        .encode(
            x=alt.X("x0:Q", title=None, scale=scale, axis=axis),
            x2="x1:Q",
            y=alt.Y("y0:Q", title=None, axis=alt.Axis(tickCount=3, format="~s")),
            y2="y1:Q",
            color=colour,
            tooltip=[
                alt.Tooltip("part:N", title="cells"),
                alt.Tooltip("count:Q", format=",", title="number"),
                alt.Tooltip("x0:Q", format=".4~g", title="from"),
                alt.Tooltip("x1:Q", format=".4~g", title="to"),
            ],
        )
    )
    lines = (
        alt.Chart()
        .transform_filter("isValid(datum.threshold)")
        .mark_rule(color="var(--ink)", strokeDash=[3, 3])
        .encode(
            x=alt.X("threshold:Q", scale=scale),
            tooltip=[alt.Tooltip("rule:N", title="threshold"), alt.Tooltip("threshold:Q", format=",~g")],
        )
    )
    return _finish(alt.layer(bars, *([lines] if thresholds else [])), height=130)


@cache
def jobs() -> dict:
    """One point per job of a rule, logarithmic. Data: ``rule, job, order, value, seconds_text, memory_text``."""
    chart = (
        alt.Chart()
        .mark_circle(size=45, opacity=0.65, color="var(--bar-deep)")
        .encode(
            y=alt.Y("rule:N", title=None, sort=alt.EncodingSortField(field="order", op="min")),
            x=alt.X(
                "value:Q",
                title=None,
                scale=alt.Scale(type="log", nice=True, padding=8),
                axis=alt.Axis(
                    tickCount=5, format="~s", gridOpacity=alt.condition("datum.label", alt.value(1), alt.value(0))
                ),
            ),
            tooltip=[
                "rule:N",
                "job:N",
                alt.Tooltip("seconds_text:N", title="time"),
                alt.Tooltip("memory_text:N", title="peak memory"),
            ],
        )
    )
    return _finish(chart, height=200)
