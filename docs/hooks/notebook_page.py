"""The notebook as a page of the site: its cells and stored outputs as Markdown, without running anything."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

NOTEBOOK = "quickstart.ipynb"
PAGE = "quickstart-notebook.md"
"""Named in the navigation; its pictures are next to it."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page and its pictures to those of the site."""
    from mkdocs.structure.files import File

    text, pictures = notebook_to_markdown((Path(config.docs_dir) / NOTEBOOK).read_text("utf-8"))
    files.append(File.generated(config, PAGE, content=text))
    for name, data in pictures.items():
        files.append(File.generated(config, name, content=data))
    return files


def notebook_to_markdown(notebook: str) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook, and its pictures by file name.

    A picture's alternative text is ``alt`` in the metadata of its cell.

    Args:
        notebook: content of an .ipynb file.

    Returns:
        The text of the page, and the PNG files that it shows.

    Raises:
        KeyError: a cell has a picture but no ``alt``.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(_fence("" if source.startswith("!") else "python", source.removeprefix("!")))
        for output in cell["outputs"]:
            data: dict[str, Any] = output.get("data", {})
            if "image/png" in data:
                name = f"images/notebook-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![{cell['metadata']['alt']}]({name})")
            else:
                parts.append(_fence(" { .text .output }", "".join(output.get("text", data.get("text/plain", "")))))
    title, *rest = parts
    heading, _, introduction = title.partition("\n")
    link = f"[Download the notebook]({NOTEBOOK}). Below are its cells and what they printed on one processor core."
    return "\n\n".join([f"{heading}\n\n{link}\n{introduction}", *rest]) + "\n", pictures


def _fence(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
