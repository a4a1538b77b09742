"""Reading a page, as text and in a real browser."""

from __future__ import annotations

import html
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Outline(HTMLParser):
    """Tags with attributes, visible text, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def fetches(found: Outline) -> list[str]:
    """Every address that a browser would fetch or run."""
    kinds = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
    values = [(k, v or "") for _, attrs in found.tags for k, v in attrs.items() if k in kinds or k.startswith("on")]
    return [v for k, v in values if k.startswith("on") or not v.startswith("#")]


def browse(profile: Path, *arguments: str) -> str:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("the layout is measured in a real browser: put chromium on PATH to run this")
    quiet = (
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--hide-scrollbars",
    )
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *quiet]
    run = subprocess.run(
        [*command, f"--user-data-dir={profile}", *arguments], capture_output=True, timeout=60, check=True
    )
    return run.stdout.decode("utf-8")


def widths(text: str, width: int, directory: Path) -> str:
    """The width of the page's content and of its frame, `scrollWidth/clientWidth`, in a frame of so many pixels.

    A frame has any width, where a window has a least one; the page itself has no script, so its frame measures it.
    """
    measure = "const d = f.contentDocument.documentElement; document.title = d.scrollWidth + '/' + d.clientWidth"
    style = f"border:0;width:{width}px;height:900px"
    frame = f'<iframe id="f" style="{style}" srcdoc="{html.escape(text)}" onload="{measure}"></iframe>'
    (directory / "frame.html").write_text(f"<!doctype html><title>?</title>{frame}", encoding="utf-8")
    dom = browse(directory / "profile", "--dump-dom", (directory / "frame.html").as_uri())
    return dom[dom.index("<title>") + len("<title>") : dom.index("</title>")]


def papers(index: Path, directory: Path) -> tuple[float, float]:
    """How bright the page's ground is in the light and in the dark scheme, after seeing that something stands on it."""
    found = []
    for scheme in (1, 0):  # light, dark
        shot = directory / f"{scheme}.png"
        settings = f"--blink-settings=preferredColorScheme={scheme}"
        size = "--window-size=1200,900"
        browse(directory / f"profile{scheme}", f"--screenshot={shot}", size, settings, index.as_uri())
        pixels = imread(shot)[..., :3]
        assert pixels.std() > 0.05, "an empty page"
        found.append(float(pixels[2, 2].mean()))
    return found[0], found[1]
