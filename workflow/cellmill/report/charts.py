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

SI = "format(datum.value, '~s')"  # an axis's own format writes zero as 0k

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
        "labelOverlap": "greedy",
        "labelSeparation": 6,
        "titlePadding": 10,
    },
    "axisY": {"labelColor": "var(--ink)", "labelLimit": 190, "labelOverlap": False},
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


def histogram(edges: list[float], domain: list[float], log: bool, form: str, thresholds: bool) -> dict:
    """Cells over a QC quantity, kept below removed, of the `group` that is chosen.

    Data: ``group, bin, kept, removed``, where bin i spans `edges` i and i + 1, and rows of ``group, threshold, rule``.
    """
    scale = alt.Scale(type="log" if log else "linear", nice=False, domain=domain)
    x = alt.X("x0:Q", title=None, scale=scale, axis=alt.Axis(grid=False, tickCount=4, format=form))
    height = alt.Y("kept:Q", title=None, axis=alt.Axis(tickCount=3, labelExpr=SI))
    base = (
        alt.Chart()
        .transform_filter("isValid(datum.bin)")
        .transform_calculate(
            x0="edges[datum.bin]", x1="edges[datum.bin + 1]", zero="0", top="datum.kept + datum.removed"
        )
    )
    tooltip = [
        alt.Tooltip("x0:Q", format=".4~g" if log else form, title="from"),
        alt.Tooltip("x1:Q", format=".4~g" if log else form, title="to"),
        alt.Tooltip("kept:Q", format=","),
        alt.Tooltip("removed:Q", format=","),
    ]
    kept = base.mark_bar(color="var(--bar)", binSpacing=0).encode(
        x=x, x2="x1:Q", y=height, y2="zero:Q", tooltip=tooltip
    )
    removed = base.mark_bar(color="var(--removed)", binSpacing=0).encode(
        x=x, x2="x1:Q", y=height, y2="top:Q", tooltip=tooltip
    )
    lines = (
        alt.Chart()
        .transform_filter("isValid(datum.threshold)")
        .mark_rule(color="var(--ink)", strokeDash=[3, 3], clip=True)
        .encode(
            x=alt.X("threshold:Q", scale=scale),
            tooltip=[alt.Tooltip("rule:N", title="threshold"), alt.Tooltip("threshold:Q", format=",~g")],
        )
    )
    chart = alt.layer(kept, removed, *([lines] if thresholds else [])).transform_filter("'' + datum.group === group")
    return _finish(chart.add_params(_group(), alt.param(name="edges", value=edges)), height=130)


def _group() -> alt.Parameter:
    return alt.param(name="group", value="0")


def density(edges: list[float], counts: list[float], genes: list[float]) -> dict:
    """Raw counts against genes in squares, darker where more cells are; a dot where some were removed.

    Data: ``group, i, j, kept, removed, shade``, the square from `edges` i, j to i + 1, j + 1, and how dark it is (to
    1); the axes' domains are given.
    """
    over_x, over_y = (alt.Scale(type="log", nice=False, domain=domain) for domain in (counts, genes))
    shade = alt.Scale(domain=[0, 1], range=[0, 1])
    tooltip = [
        alt.Tooltip("x0:Q", format=",.0f", title="counts from"),
        alt.Tooltip("y0:Q", format=",.0f", title="genes from"),
        alt.Tooltip("kept:Q", format=","),
        alt.Tooltip("removed:Q", format=","),
    ]
    axis = alt.Axis(grid=False, tickCount=4, format="~s")
    squares = (
        alt.Chart()
        .mark_rect(color="var(--bar-deep)")
        .encode(
            x=alt.X("x0:Q", title="raw counts", scale=over_x, axis=axis),
            x2="x1:Q",
            y=alt.Y("y0:Q", title="genes", scale=over_y, axis=axis),
            y2="y1:Q",
            opacity=alt.Opacity("shade:Q", scale=shade, legend=None),
            tooltip=tooltip,
        )
    )
    dots = (
        alt.Chart()
        .transform_filter("datum.removed > 0")
        .mark_circle(color="var(--removed)", opacity=0.9)
        .encode(
            x=alt.X("x:Q", scale=over_x),
            y=alt.Y("y:Q", scale=over_y),
            size=alt.Size("part:Q", scale=alt.Scale(type="sqrt", domain=[0, 1], range=[6, 50]), legend=None),
            tooltip=tooltip,
        )
    )
    chart = (
        alt.layer(squares, dots)
        .transform_filter("'' + datum.group === group")
        .transform_calculate(
            x0="edges[datum.i]", x1="edges[datum.i + 1]", y0="edges[datum.j]", y1="edges[datum.j + 1]",
            x="sqrt(edges[datum.i] * edges[datum.i + 1])", y="sqrt(edges[datum.j] * edges[datum.j + 1])",
            part="datum.removed / (datum.kept + datum.removed)",
        )
        .add_params(_group(), alt.param(name="edges", value=edges))
    )  # fmt: skip
    return _finish(chart, height=330)


@cache
def strips(log: bool, form: str) -> dict:
    """Quantiles of the kept cells of each data set: 5 to 95 % thin, 25 to 75 % thick, a tick at the median.

    Data: ``dataset, cells, q05, q25, q50, q75, q95``.
    """
    scale = alt.Scale(type="log", nice=True) if log else alt.Scale(nice=True, zero=True)
    labelled = alt.condition("datum.label", alt.value(1), alt.value(0))
    axis = alt.Axis(tickCount=3, format=form, grid=True, gridOpacity=labelled)
    y = alt.Y("dataset:N", title=None, sort=alt.EncodingSortField(field="cells", op="max", order="descending"))
    tooltip = [
        "dataset:N",
        alt.Tooltip("cells:Q", format=",", title="kept cells"),
        *(
            alt.Tooltip(f"{name}:Q", format=",.4~g" if log else ".3~g", title=title)
            for name, title in _QUANTILES.items()
        ),
    ]
    base = alt.Chart().encode(y=y, tooltip=tooltip)
    wide = base.mark_rule(strokeWidth=1.5, color="var(--bar)").encode(
        x=alt.X("q05:Q", title=None, scale=scale, axis=axis), x2="q95:Q"
    )
    thick = base.mark_rule(strokeWidth=6, color="var(--bar)").encode(x=alt.X("q25:Q", scale=scale), x2="q75:Q")
    middle = base.mark_tick(thickness=2.5, size=12, color="var(--bar-deep)").encode(x=alt.X("q50:Q", scale=scale))
    return _finish(alt.layer(wide, thick, middle), height=200)


_QUANTILES = {"q05": "5 %", "q25": "25 %", "q50": "median", "q75": "75 %", "q95": "95 %"}


def removed_bars(colours: dict[str, str]) -> dict:
    """What became of the selected cells of each data set, as shares or (`share` false) as numbers.

    Data: ``dataset, place, rule, order, cells, selected, share``; `colours` by rule, kept among them.
    """
    label = "share ? format(datum.value, '.0%') : format(datum.value, '~s')"
    chart = (
        alt.Chart()
        .transform_calculate(value="share ? datum.share : datum.cells")
        .mark_bar(height=alt.RelativeBandSize(0.66))
        .encode(
            y=alt.Y("dataset:N", title=None, sort=alt.EncodingSortField(field="place", op="min")),
            x=alt.X("value:Q", title=None, scale=alt.Scale(nice=False), axis=alt.Axis(tickCount=5, labelExpr=label)),
            color=alt.Color("rule:N", legend=None, scale=alt.Scale(domain=list(colours), range=list(colours.values()))),
            order=alt.Order("order:Q"),
            tooltip=[
                "dataset:N",
                "rule:N",
                alt.Tooltip("cells:Q", format=","),
                alt.Tooltip("share:Q", format=".1%", title="of its selected cells"),
            ],
        )
        .add_params(alt.param(name="share", value=True))
    )
    return _finish(chart, height=200)


def mapping_bars(colours: dict[str, str]) -> dict:
    """How the genes of each file found their ids: shares of its counts or (`counts` false) of its genes.

    Data: ``dataset, place, how, order, genes, gene_share, count_share``; `colours` by way of mapping.
    """
    chart = (
        alt.Chart()
        .transform_calculate(value="counts ? datum.count_share : datum.gene_share")
        .mark_bar(height=alt.RelativeBandSize(0.66))
        .encode(
            y=alt.Y("dataset:N", title=None, sort=alt.EncodingSortField(field="place", op="min")),
            x=alt.X("value:Q", title=None, scale=alt.Scale(nice=False), axis=alt.Axis(tickCount=5, format=".0%")),
            color=alt.Color("how:N", legend=None, scale=alt.Scale(domain=list(colours), range=list(colours.values()))),
            order=alt.Order("order:Q"),
            tooltip=[
                "dataset:N",
                alt.Tooltip("how:N", title="mapped by"),
                alt.Tooltip("genes:Q", format=","),
                alt.Tooltip("gene_share:Q", format=".2%", title="of its genes"),
                alt.Tooltip("count_share:Q", format=".2%", title="of its counts"),
            ],
        )
        .add_params(alt.param(name="counts", value=True))
    )
    return _finish(chart, height=200)


@cache
def matrix() -> dict:
    """Data set against data set, darker where more cells are. Data: ``dataset, kept_dataset, cells``."""
    axis = alt.Axis(labelAngle=-40, labelLimit=150, orient="top", grid=False)
    base = alt.Chart().encode(
        x=alt.X("kept_dataset:N", title=None, axis=axis),
        y=alt.Y("dataset:N", title=None),
        tooltip=[
            alt.Tooltip("dataset:N", title="cells of"),
            alt.Tooltip("kept_dataset:N", title="equal cells of"),
            alt.Tooltip("cells:Q", format=","),
        ],
    )
    shade = alt.Opacity("cells:Q", scale=alt.Scale(type="log", range=[0.25, 1]), legend=None)
    squares = base.mark_rect(color="var(--bar)", stroke="var(--page)").encode(opacity=shade)
    texts = (
        base.mark_text(fontSize=12, color="var(--ink)")
        .encode(text=alt.Text("cells:Q", format=","))
        .properties(name="texts")
    )
    return _finish(alt.layer(squares, texts), height=200)


@cache
def amounts() -> dict:
    """Cells of each value of a column of obs. Data: ``value, place, cells, share``."""
    chart = (
        alt.Chart()
        .mark_bar(height=alt.RelativeBandSize(0.62), color="var(--bar)")
        .encode(
            y=alt.Y("value:N", title=None, sort=alt.EncodingSortField(field="place", op="min")),
            x=alt.X("cells:Q", title=None, axis=alt.Axis(tickCount=4, labelExpr=SI)),
            tooltip=[
                "value:N",
                alt.Tooltip("cells:Q", format=","),
                alt.Tooltip("share:Q", format=".1%", title="of all cells"),
            ],
        )
    )
    return _finish(chart, height=200)


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
