"""Pieces of a report's HTML: style, sections with a list of contents, tables, and images within a budget of bytes.

Names and texts from outside are escaped here.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.hub.card_facts import FolderFacts
from diffusers_ddpm_ext.utils.input_files import read_bytes

MAX_IMAGE_BYTES, MAX_PAGE_IMAGE_BYTES, MAX_PIXELS = 16 * 2**20, 64 * 2**20, 2**26
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CAPTION = 4000  # characters, which the best values of eight runs with long names have
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8885; padding-bottom: .2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
td, th { overflow-wrap: anywhere; min-width: 5rem; } tr > th:first-child { white-space: nowrap; }
img { max-width: 100%; height: auto; background: #fff; } figure { margin: 0 0 1rem; }
.many { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
.beside { display: flex; gap: 1rem; overflow-x: auto; } .beside figure { flex: 1 0 12rem; }
.wide { overflow-x: auto; } nav ul { columns: 14rem; padding-left: 1.2rem; } summary { cursor: pointer; }
figcaption { font-size: .85em; opacity: .8; } pre { overflow-x: auto; background: #8881; padding: .8rem; }
"""


def page_parts(title: str, sections: Sequence[tuple[str, str]], intro: str = "") -> Iterator[str]:
    """A page, in pieces.

    Args:
        title: of the page, text.
        sections: titles, text, and contents, HTML; those without content are left out.
        intro: HTML below the title.
    """
    shown = [(name, _anchor(name), content) for name, content in sections if content]
    name = html.escape(printable(title, 300))
    yield f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
    yield f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
    yield f"<h1>{name}</h1>\n{intro}"
    links = "".join(f'<li><a href="#{anchor}">{html.escape(name)}</a></li>' for name, anchor, _ in shown)
    yield f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n' if len(shown) > 1 else ""
    for name, anchor, content in shown:
        yield f'<section id="{anchor}"><h2>{html.escape(name)}</h2>{content}</section>\n'
    yield "</body></html>\n"


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table of texts whose first column names the rows; empty without rows."""
    top = f"<tr>{''.join(f'<th>{_cell(name)}</th>' for name in head)}</tr>" if head else ""
    lines = "".join(
        f"<tr><th>{_cell(name, 300)}</th>{''.join(f'<td>{_cell(value)}</td>' for value in values)}</tr>"
        for name, *values in rows
    )
    return f'<div class="wide"><table>{top}{lines}</table></div>\n' if lines else ""


def folded(text: str, summary: str) -> str:
    """A long text that a click on its summary opens."""
    if not text:
        return ""
    return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"


class Figures:
    """Images of a page, of which all together have at most 64 MiB."""

    def __init__(self) -> None:
        self._bytes = 0

    def figure(self, facts: FolderFacts, path: Path | None, caption: str) -> str:
        """A PNG inside the page, empty without a path; one that cannot be shown becomes a problem of ``facts``."""
        content = b"" if path is None else facts.attempt(lambda: self._read(path), b"")
        if not content:
            return ""
        text, data = html.escape(printable(caption, MAX_CAPTION)), base64.b64encode(content).decode()
        return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'

    def _read(self, path: Path) -> bytes:
        content = read_bytes(path, max_bytes=MAX_IMAGE_BYTES)
        name = printable(str(path))
        width, height = (int.from_bytes(content[start : start + 4]) for start in (16, 20))
        if not content.startswith(PNG_SIGNATURE) or content[12:16] != b"IHDR" or len(content) < 33:
            raise ConfigError(f"{name} is not a PNG")
        if width * height > MAX_PIXELS:
            raise ConfigError(f"{name} has {width:,} x {height:,} pixels, more than the {MAX_PIXELS:,} that are shown")
        if self._bytes + len(content) > MAX_PAGE_IMAGE_BYTES:
            raise ConfigError(f"{name}: the images before it have {self._bytes:,} bytes, which is enough")
        self._bytes += len(content)
        return content


def _cell(text: str, limit: int = 2000) -> str:
    return html.escape(printable(text, limit))


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
