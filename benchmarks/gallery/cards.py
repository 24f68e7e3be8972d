"""The model card of an entry, as ``ddpm-ext push`` would write it, beside its pictures."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from diffusers_ddpm_ext.hub.card import make_card

MEASURED = ("metrics/sample_metrics.json", "bound/evaluation.json")
PICTURE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<path>[^)\s]+)\)\n\n(?P<caption>(?P=text)\n\n)?")


def model_card(name: str, folder: Path, shown: Path) -> str:
    """The text of the card.

    Args:
        name: of the entry.
        folder: of everything the entry's command has made; what was measured is copied into its model's folder, where
            ``ddpm-ext evaluate`` would have put it.
        shown: folder of the entry's pictures, in which the card will be; others are left out of it.
    """
    model = folder / "model"
    (model / "evaluation").mkdir(exist_ok=True)
    for path in MEASURED:
        if (folder / path).exists():
            shutil.copy(folder / path, model / "evaluation")

    def picture(match: re.Match[str]) -> str:
        file = Path(match["path"]).name
        return match[0].replace(match["path"], file) if (shown / file).exists() else ""

    return PICTURE.sub(picture, make_card(model, name))
