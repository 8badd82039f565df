"""The chart of a learning-rate test, as a file that stands for itself."""

from pathlib import Path

import altair as alt
import vl_convert

from cellmill.files import atomic
from cellmill.training.find_rate import RateTest

LOSS, MEAN, MARK, TURN = "#a3acb7", "#1f66c1", "#23794f", "#c7680f"


def write_chart(test: RateTest, title: str, path: Path) -> None:
    """Loss over learning rate as SVG: every step's, the smoothed one, and the two rates that were read from it."""
    low, start = (
        float(min(test.losses_T.min(), test.smoothed_T.min())),
        float(test.losses_T[: len(test.losses_T) // 5].max()),
    )
    margin = 0.08 * max(start - low, abs(start) * 1e-3)
    scale = alt.Scale(domain=[low - margin, start + 4 * margin], nice=False)
    rows = [
        {"rate": rate, "loss": loss, "smoothed": smoothed}
        for rate, loss, smoothed in zip(
            test.rates_T.tolist(), test.losses_T.tolist(), test.smoothed_T.tolist(), strict=True
        )
    ]
    marks = [
        {"rate": rate, "said": f"{said} {rate:.2g}", "kind": kind}
        for kind, said, rate in (
            ("suggestion", "falls fastest at", test.suggestion),
            ("divergence", "diverges from", test.divergence),
        )
        if rate is not None
    ]
    x = alt.X(
        "rate:Q",
        title="learning rate",
        scale=alt.Scale(type="log", nice=False),
        axis=alt.Axis(format="~e", grid=False, tickCount=7),
    )
    colour = alt.Color("kind:N", legend=None, scale=alt.Scale(domain=["suggestion", "divergence"], range=[MARK, TURN]))
    base = alt.Chart(alt.Data(values=rows)).encode(x=x)
    steps = base.mark_point(size=14, color=LOSS, filled=True, clip=True).encode(
        y=alt.Y("loss:Q", title="training loss", scale=scale)
    )
    mean = base.mark_line(color=MEAN, strokeWidth=2, clip=True).encode(y=alt.Y("smoothed:Q", scale=scale))
    named = alt.Chart(alt.Data(values=marks)).encode(x=x, color=colour)
    lines = named.mark_rule(strokeDash=[3, 3])
    texts = named.mark_text(align="right", dx=-5, dy=10, y=0, baseline="top", fontSize=12).encode(text="said:N")
    chart = alt.layer(steps, mean, lines, texts).properties(width=560, height=300, title=title, background="white")
    with atomic(path) as temporary:
        temporary.write_text(vl_convert.vegalite_to_svg(chart.to_dict(), vl_version="v" + vl_version()))


def vl_version() -> str:
    """The version of Vega-Lite that altair writes, as vl-convert names it."""
    return "_".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
