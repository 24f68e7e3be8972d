"""Build a small set of pictures with captions: emoji whose names are a color and a shape, at 12 x 12.

    python benchmarks/captions/shapes.py FOLDER [--font NotoColorEmoji.ttf --list emoji-test.txt]

The captions are the names in Unicode's list: "red heart", "light blue heart", "black medium-small square", "large
orange diamond". White ones are left out, since the ground is white.
``FOLDER/train`` has the pictures and ``metadata.jsonl``, where every picture has two captions, its name and the name
with an article; ``FOLDER/all`` has the pictures of `LEFT_OUT` as well, whose names no run is trained on. Without
``--font`` and ``--list`` the sources are those of ../latents/emoji.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageFont

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "latents"))
import emoji  # noqa: E402

SIZE = 12
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "pink", "grey")
SHAPES = ("heart", "circle", "square", "diamond", "book", "apple", "mark", "flag", "up", "down")
"""Last words of the names; "up" and "down" are triangles pointed there."""
LEFT_OUT = ("blue circle", "green heart", "red square")


def write_pictures(folder: Path, font_path: Path, list_path: Path) -> dict[str, int]:
    """Draw every emoji with a color and a shape in its name, and return the counts."""
    font = ImageFont.truetype(str(font_path), emoji.STRIKE)
    rows: dict[str, list[dict[str, object]]] = {"train": [], "all": []}
    for name, characters in shape_names(list_path):
        picture = emoji.draw(font, characters)
        if picture is None:
            continue
        picture = picture.resize((SIZE, SIZE), Image.Resampling.BOX)
        file, article = f"{name.replace(' ', '_')}.png", "an" if name[0] in "aeiou" else "a"
        for part in ("all",) if name in LEFT_OUT else ("all", "train"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            picture.save(folder / part / file)
            rows[part].append({"file_name": file, "name": name, "text": [name, f"{article} {name}"]})
    for part, lines in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (folder / part / "metadata.jsonl").write_text(text, encoding="utf-8")
    return {part: len(lines) for part, lines in rows.items()}


def shape_names(list_path: Path) -> list[tuple[str, str]]:
    """Name and characters of the emoji of Unicode's list that are named after a color and a shape."""
    found = []
    for _, name, characters in emoji.read_list(list_path.read_text(encoding="utf-8")):
        words = name.split()
        if set(COLORS) & set(words) and words[-1] in SHAPES:
            found.append((name, characters))
    return found


if __name__ == "__main__":
    sys.exit(emoji.main(__doc__, write_pictures))
