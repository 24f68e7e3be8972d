"""Pages with wide tables have no contents beside them; set here, since a Git host would show it in their files."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.structure.pages import Page

WIDE = ("coming-from-compvis.md", "comparison.md", "released-models.md", "samplers.md")


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Hide the contents of such a page.

    Args:
        markdown: of the page, returned as it is.
        page: the page.
    """
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    return markdown
