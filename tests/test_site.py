"""Everyone can read the site: texts of pictures, order of headings, contrast, nothing from elsewhere."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.paths import ROOT, TESTS

PAGES = sorted(ROOT.glob("docs/*.md"))
REFERENCE = {"api", "architecture", "file-formats", "maths"}
WITHOUT_PICTURE = {"coming-from-openai", "comparison", "install", "released-models"}
"""Pages of names and tables, which have nothing to show."""
MAX_PNG_BYTES, MAX_GALLERY_BYTES = 60_000, 400_000
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), "")


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def pictures(page: Path) -> list[tuple[str, str]]:
    """Alternative text and path of each picture of a page."""
    return re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", without_code(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pictures_are_small_files_with_a_text(page):
    for text, path in pictures(page):
        assert len(text.split()) >= 4, f"{path}: {text!r} does not describe it"
        file = page.parent / path
        assert file.is_file(), path
        assert file.stat().st_size <= (MAX_GALLERY_BYTES if path.startswith("gallery/") else MAX_PNG_BYTES), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_guide_has_a_picture(page):
    if page.stem not in REFERENCE | WITHOUT_PICTURE:
        assert pictures(page)


def test_every_picture_is_on_a_page():
    shown = {(page.parent / path).name for page in [*PAGES, ROOT / "README.md"] for _, path in pictures(page)}
    files = [
        path for folder in ("images", "gallery") for path in (ROOT / "docs" / folder).rglob("*") if path.is_file()
    ]
    assert {path.name for path in files if path.suffix not in (".json", ".md")} <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_headings_are_in_order(page):
    """One of the first level, at the top, and no level is left out on the way down."""
    levels = [len(marks) for marks in re.findall(r"^(#+) ", without_code(page), re.M)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels


class Page(HTMLParser):
    """What a page of the site loads when it is opened, its pictures without a text, and the levels of its headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.without_text: list[str] = []
        self.levels: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(values.get("href") or "")
        self.loaded += [values[key] or "" for key in ("src", "srcset", "poster", "data") if key in values]
        if tag == "img" and values.get("alt") is None:
            self.without_text.append(values.get("src") or "")
        if re.fullmatch(r"h[1-6]", tag):
            self.levels.append(int(tag[1]))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    completed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr[-2000:]
    return folder


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site):
    """Links lead out; scripts, styles, fonts and pictures are files of the site."""
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for path in pages:
        text = path.read_text()
        page = Page(text)
        for target in [*page.loaded, *re.findall(r"url\(([^)]*)\)", text)]:
            assert not re.match(r"['\"]?(https?:)?//", target), f"{path}: {target}"
        assert 'class="mermaid"' not in text, f"{path}: the theme loads mermaid from a CDN"
        assert not page.without_text, path
    for path in site.rglob("*.css"):
        for target in re.findall(r"url\(([^)]*)\)|@import ([^;]*)", path.read_text()):
            assert not re.match(r"['\"]?(https?:)?//", "".join(target)), f"{path}: {target}"


@pytest.mark.slow
def test_headings_of_the_site_are_in_order(site):
    for path in site.rglob("*.html"):
        levels = Page(path.read_text()).levels
        assert levels[:1] == [1], path
        assert all(after <= before + 1 for before, after in pairwise(levels)), f"{path}: {levels}"


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_texts_of_the_site_have_contrast(site, tmp_path):
    """At least 4.5 (WCAG 2.1, AA) for every text of every page, in the light and in the dark theme."""
    script = (TESTS / "helpers" / "contrast.js").read_text()
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path}", "--window-size=1280,900", "--virtual-time-budget=5000", "--dump-dom"]
    problems = []
    for path in sorted(site.rglob("*.html")):
        copy = path.with_name("contrast.html")
        copy.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
        shown = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, check=True, timeout=120)
        copy.unlink()
        match = re.search(r'<pre id="contrast">(.*?)</pre>', shown.stdout, re.S)
        assert match is not None, path
        for report in json.loads(html.unescape(match[1])):
            assert report["count"] > 20, f"{path}: {report}"
            problems += [f"{path.relative_to(site)}, {report['scheme']}: {item}" for item in report["low"].items()]
    assert not problems, "\n".join(problems)
