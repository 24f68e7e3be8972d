"""Code breaks where a reader expects it: in tables after a dot, slash or underscore, and nowhere inside ``--name``."""

from __future__ import annotations

import re

INLINE = re.compile(r"(?<!<pre>)<code>([^<]*)</code>")
TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
OPTION = re.compile(r"--\w[\w-]*")
BREAK_AFTER = re.compile(r"(?<=[\w)])(::|[._/=])(?=[^\W\d])")


def on_page_content(content: str, **_: object) -> str:
    """Mark the places in the HTML of a page.

    Args:
        content: HTML below the page's header.
    """
    content = TABLE.sub(lambda table: INLINE.sub(_with_breaks, table[0]), content)
    return INLINE.sub(_with_whole_options, content)


def _with_breaks(code: re.Match[str]) -> str:
    """Inline code of a table, with options that stay whole and breaks in longer names."""
    parts = OPTION.split(code[1])
    options = [_whole(option) for option in OPTION.findall(code[1])]
    broken = [BREAK_AFTER.sub(r"\1<wbr>", part) for part in parts]
    return f"<code>{''.join(a + b for a, b in zip(broken, [*options, ''], strict=True))}</code>"


def _with_whole_options(code: re.Match[str]) -> str:
    return f"<code>{OPTION.sub(lambda option: _whole(option[0]), code[1])}</code>"


def _whole(option: str) -> str:
    return f'<span class="option">{option}</span>'
