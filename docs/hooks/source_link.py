"""A link to the source code in the footer of every page, where ``REPO_URL`` is its address.

Not the theme's own ``repo_url``: with that, every page asks the host for stars and forks when it is opened.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the link.

    Raises:
        ValueError: the address is none of http or https.
    """
    url = os.environ.get("REPO_URL")
    if url:
        if not re.fullmatch(r"https?://[^\s\"<>]+", url):
            raise ValueError(f"REPO_URL is {url!r}; it must be an address that starts with https://")
        icon = "fontawesome/brands/github" if "//github.com/" in url else "fontawesome/brands/git-alt"
        config.extra.setdefault("social", []).append({"icon": icon, "link": url, "name": "Source code"})
    return config
