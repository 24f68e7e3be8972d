"""Build a small color set of free pictures: emoji at 64 x 64, by the groups of Unicode's list.

    python benchmarks/latents/emoji.py FOLDER [--font NotoColorEmoji.ttf --list emoji-test.txt] [--held_out 10]

Writes ``FOLDER/train`` and ``FOLDER/held_out``, image folders with one subfolder per group (nine classes), and
``FOLDER/emoji.json`` with counts and the sources' sha256. Without ``--font`` and ``--list`` the two files come from
Debian's packages ``fonts-noto-color-emoji`` (SIL Open Font License 1.1) and ``unicode-data`` (Unicode License), which
``apt-get download`` fetches and nothing installs.

Skin tones are left out, and pictures that equal an earlier one. The held-out tenth is chosen by a hash of the name
without its gender ("man running", "woman running"), so that variants stay on one side.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

SIZE = 64
STRIKE = 109  # pixels per em of the only size in the font: its bitmaps are 136 x 128
PACKAGES = ("fonts-noto-color-emoji", "unicode-data")
FONT, LIST = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", "usr/share/unicode/emoji/emoji-test.txt"
SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
GENDERS = re.compile(r"\b(man|woman|person|men|women|people)\b")
HELD_OUT = 10  # one picture in so many


def main(description: str | None, write: Callable[..., dict[str, Any]], held_out: int | None = None) -> int:
    """Build a set from the command line: ``write`` draws it from the font and the list, and counts.

    With ``held_out``, the default of an option, it takes that, too.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--font", type=Path, help="color bitmap font (default: Debian's Noto Color Emoji)")
    parser.add_argument("--list", type=Path, dest="emoji_list", help="Unicode's emoji-test.txt (default: Debian's)")
    if held_out is not None:
        parser.add_argument("--held_out", type=int, default=held_out, help="hold out one picture in so many")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists")
    with tempfile.TemporaryDirectory() as scratch:
        if options.font is None or options.emoji_list is None:
            unpack_packages(Path(scratch))
        font = options.font or Path(scratch) / FONT
        emoji_list = options.emoji_list or Path(scratch) / LIST
        chosen = {} if held_out is None else {"held_out": options.held_out}
        counts = write(options.folder, font, emoji_list, **chosen)
    print(json.dumps(counts, indent=2))
    return 0


def unpack_packages(folder: Path) -> None:
    """Download and unpack Debian's packages, without installing them."""
    for package in PACKAGES:
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    for archive in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)


def read_list(text: str) -> Iterator[tuple[str, str, str]]:
    """Group, name and characters of each fully qualified emoji without a skin tone, from Unicode's list."""
    group = ""
    for line in text.splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").strip()
        elif "; fully-qualified" in line:
            codes, rest = line.split(";", 1)
            characters = "".join(chr(int(code, 16)) for code in codes.split())
            if not SKIN_TONES & set(characters):
                yield group, re.split(r"E\d+\.\d+ ", rest, maxsplit=1)[1].strip(), characters


def draw(font: ImageFont.FreeTypeFont, characters: str) -> Image.Image | None:
    """One emoji on white, centered in a square and reduced to `SIZE`; None if the font has no single glyph for it."""
    left, top, right, bottom = font.getbbox(characters)
    if right - left > 1.25 * STRIKE + 1 or right <= left:
        return None
    side = max(right - left, bottom - top)
    square = Image.new("RGBA", (int(side), int(side)), "white")
    corner = ((side - (right - left)) / 2 - left, (side - (bottom - top)) / 2 - top)
    ImageDraw.Draw(square).text(corner, characters, font=font, embedded_color=True)
    return square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX, reducing_gap=None)


def write_pictures(folder: Path, font_path: Path, list_path: Path, held_out: int = HELD_OUT) -> dict[str, object]:
    """Draw every emoji of the list into its folder, and return the counts."""
    if not features.check("raqm"):
        sys.exit("error: this Pillow has no raqm, which joins characters to one emoji; the wheels of PyPI have it.")
    font = ImageFont.truetype(str(font_path), STRIKE)
    seen: set[bytes] = set()
    counts: dict[str, dict[str, int]] = {"train": {}, "held_out": {}}
    left_out = 0
    for group, name, characters in read_list(list_path.read_text(encoding="utf-8")):
        picture = draw(font, characters)
        pixels = b"" if picture is None else np.asarray(picture).tobytes()
        if picture is None or pixels in seen:
            left_out += 1
            continue
        seen.add(pixels)
        key = hashlib.sha256(" ".join(GENDERS.sub("", name).split()).encode()).digest()
        part = "held_out" if int.from_bytes(key[:4], "big") % held_out == 0 else "train"
        place = folder / part / group.replace(" & ", "_and_")
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / ("-".join(f"{ord(character):x}" for character in characters) + ".png"))
        counts[part][place.name] = counts[part].get(place.name, 0) + 1
    report: dict[str, object] = {
        "pictures": {part: sum(groups.values()) for part, groups in counts.items()},
        "groups": counts,
        "left_out": left_out,
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (font_path, list_path)},
    }
    (folder / "emoji.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    sys.exit(main(__doc__, write_pictures, HELD_OUT))
