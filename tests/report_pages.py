"""Written pages, parsed and shown in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """A parsed page: its text, its scripts by type, and every attribute that could load something."""

    LOADING = {"src", "href", "srcset", "data", "action", "poster", "xlink:href", "background", "formaction"}

    def __init__(self, html: str):
        super().__init__()
        self.html, self.texts, self.loads, self.scripts, self.styles, self._inside = html, [], [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self._inside = [tag, dict(attributes)]
        self.loads += [(tag, value) for name, value in attributes if name in self.LOADING]
        self.styles += [value for name, value in attributes if name == "style"]

    def handle_endtag(self, tag):
        self._inside = []

    def handle_data(self, text):
        tag, attributes = self._inside or (None, {})
        if tag == "script":
            self.scripts.append((attributes.get("type"), text))
        elif tag == "style":
            self.styles.append(text)
        else:
            self.texts.append(text)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def payload(self) -> dict:
        return json.loads(next(text for kind, text in self.scripts if kind == "application/json"))


def chromium() -> str | None:
    """The browser of this machine, if it has one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(path: Path, folder: Path) -> str:
    """The page as the browser holds it once all is drawn; nothing may be said on its console."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    flags += ["--virtual-time-budget=60000", f"--user-data-dir={folder / 'browser'}"]
    command = [chromium(), *flags, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    return done.stdout


def assert_all_is_drawn(shown: str, page: Page) -> None:
    """Every figure of the page was drawn, without an error."""
    html = re.search(r"<html[^>]*>", shown).group()
    assert 'data-state="ready"' in html
    assert 'data-errors=""' in html
    n_figures = page.html.count('class="chart" id=')
    assert f'data-charts="{n_figures}"' in html
