"""Names and texts from outside in Markdown: whatever they hold, they are shown and never act.

A name may come from a folder, a data set or a configuration: raw HTML, headings, links, pipes of a table, code fences.
In a code span or escaped in ``<pre>`` they mean nothing in CommonMark, GitHub's dialect and Python-Markdown.
"""

from __future__ import annotations

import html
import re

from diffusers_ddpm_ext.errors import printable, printable_lines

PLAIN = re.compile(r"[A-Za-z0-9]+(?:[ -][A-Za-z0-9]+)*|[0-9]+(?:\.[0-9]+){1,2}")


MAX_NAME = 200  # characters; of a longer name the middle is left out


def inline_text(text: str, in_table: bool = False) -> str:
    """A name on one line: words and version numbers as they are, anything else as a `code_span`."""
    shown = printable(text, MAX_NAME)
    return shown if PLAIN.fullmatch(shown) else code_span(text, in_table)


def code_span(text: str, in_table: bool = False) -> str:
    """A name as a code span that nothing in the name can close; ``in_table`` escapes the pipes for a cell."""
    shown = printable(text, MAX_NAME)
    if not shown.strip():
        return "(no name)"
    longest = max((len(ticks) for ticks in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    padding = " " if shown[0] in "` " or shown[-1] in "` " else ""  # the renderer takes one space off each end
    if in_table:
        shown = shown.replace("|", "\\|")
    return f"{fence}{padding}{shown}{padding}{fence}"


def preformatted(text: str) -> str:
    """A text of several lines as a block that nothing in the text can close."""
    return f"<pre><code>{html.escape(printable_lines(text.rstrip()))}</code></pre>"
