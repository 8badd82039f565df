"""From plain data to a self-contained HTML page: figures for the page's script, templates, styles, scripts."""

import json
import re
from functools import cache
from pathlib import Path

import jinja2
import numpy as np

from cellmill.files import atomic
from cellmill.report import charts, summary

TEMPLATES = Path(__file__).resolve().parents[2] / "report"
TASK_TITLES = {"annotation": "Cell-type annotation", "integration": "Batch integration"}


class Figures:
    """What the page's script draws: specs, shared data, figures."""

    def __init__(self):
        self.payload = {"specs": {}, "data": {}}

    def figure(self, spec: str, template: dict, source: str, rows, *, height: int | None = None, **signals) -> dict:
        """Register a figure and return what the template needs of it.

        `rows` is a list of records, or None where `source` is there already; `height` (px) overrides the spec's.
        """
        self.payload["specs"].setdefault(spec, template)
        if rows is not None:
            self.payload["data"][source] = columns(rows)
        return {
            "spec": spec,
            "source": source,
            "signals": signals,
            "id": f"{spec}-{source}",
            "height": height or template["height"],
        }


def columns(rows: list[dict]) -> dict[str, list]:
    """Records as columns, which are shorter as JSON."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def write_page(template: str, scripts: list[str], context: dict, payload: dict, out: Path) -> None:
    """Write a page from a template of ``workflow/report``, the names of its scripts, its data, and what they draw."""
    page = _environment().get_template(template)
    html = page.render(
        **context,
        payload=_to_json(payload),
        bundle=_javascript(),
        style=(TEMPLATES / "page.css").read_text(),
        scripts=[(TEMPLATES / name).read_text() for name in scripts],
    )
    with atomic(out) as temporary:
        temporary.write_text(html, encoding="utf-8")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["share"] = share
    environment.filters["title_of"] = lambda task: TASK_TITLES.get(task, task.replace("_", " ").capitalize())
    environment.filters["metric"] = summary.metric_name
    environment.filters["words"] = lambda name: name.replace("_", " ")
    environment.filters["json"] = _to_json
    return environment


def share(value: float) -> str:
    """A share as it is printed everywhere: per cent, and never 0 or 100 % where it is not all."""
    if 0 < value < 0.0005:
        return "< 0.1 %"
    if 0.9995 < value < 1:
        return "> 99.9 %"
    return f"{100 * value:.1f} %"


def _to_json(content) -> str:
    """JSON that may stand inside a script element, whatever names it holds."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"), default=_plain)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: np.generic) -> int | float | str:
    """A numpy scalar, of which tables are made, as JSON knows it."""
    return value.item()


@cache
def _javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed, safe inside a script element."""
    import vl_convert

    bundle = vl_convert.javascript_bundle(vl_version=charts.VEGA_LITE)
    return re.sub(r"</(script)", r"<\\/\1", bundle, flags=re.IGNORECASE)
