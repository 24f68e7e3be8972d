"""Time of an epoch of images with `--cache_images`, compared with Diffusers' `train_unconditional.py`; and of a start.

    python benchmarks/bench_data.py epoch [--images 2000] [--rounds 5]
    python benchmarks/bench_data.py start [--rows 1000 100000 1000000]

epoch: 2,000 JPEG files of 256 x 256 become batches of 64 x 64 in [-1, 1], flipped at random. The reference is the
input of `train_unconditional.py`: `datasets`' imagefolder with a transform, a DataLoader, and torchvision's transforms
for PIL images, repeated here line by line, since torchvision is not needed for them: convert("RGB"), Resize,
CenterCrop, RandomHorizontalFlip, ToTensor, Normalize. Ours is the stream of a run's second epoch. The two take turns,
one thread each, and ours is compared to the bit with a run that decodes each time. Seconds are those of the processor,
which depend less on other load on the machine.

start: rows of small PNG images in a parquet file, or in files of a folder, read by a run for the first time and again,
each in a process of its own: seconds until the first batch, memory that this takes after 200 batches (without mapped
files), and the time of a batch. Seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.batches import batch_stream
from diffusers_ddpm_ext.training.data.dataset import load_data

BATCH = 16
SIZE = 64
SEED = 0


# ------------------------------------------------------------------ an epoch


def save_photos(folder: Path, count: int) -> None:
    """Save JPEG files of 256 x 256 with smooth shapes and some noise, as photographs have."""
    folder.mkdir()
    draw = np.random.default_rng(SEED)
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((256, 256), Image.BICUBIC)
        noisy = np.asarray(coarse, np.float32) + draw.normal(0, 6, (256, 256, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05}.jpg", quality=90)


def to_tensor(image: Image.Image) -> Tensor:
    """What `torchvision.transforms.functional.to_tensor` does to a PIL image."""
    values = torch.from_numpy(np.array(image, np.uint8, copy=True))
    values = values.view(image.size[1], image.size[0], len(image.getbands()))
    return values.permute((2, 0, 1)).contiguous().to(torch.get_default_dtype()).div(255)


def normalize(tensor: Tensor) -> Tensor:
    """What `torchvision.transforms.functional.normalize` does with a mean and a deviation of 0.5."""
    tensor = tensor.clone()
    mean, std = (torch.as_tensor([0.5], dtype=tensor.dtype).view(-1, 1, 1) for _ in range(2))
    return tensor.sub_(mean).div_(std)


def augment(image: Image.Image) -> Tensor:
    """The transforms of `train_unconditional.py` with ``--center_crop --random_flip``."""
    width, height = image.size
    short = min(width, height)
    image = image.resize((SIZE * width // short, SIZE * height // short), Image.BILINEAR)
    left, top = (image.size[0] - SIZE) // 2, (image.size[1] - SIZE) // 2
    image = image.crop((left, top, left + SIZE, top + SIZE))
    if torch.rand(1) < 0.5:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    return normalize(to_tensor(image))


def stock_epochs(folder: Path, cache: Path) -> Callable[[], int]:
    """One epoch of `train_unconditional.py`'s DataLoader; returns the number of images."""
    from datasets import load_dataset

    dataset = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(cache))
    dataset.set_transform(lambda examples: {"input": [augment(image.convert("RGB")) for image in examples["image"]]})
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=0)
    return lambda: sum(len(batch["input"]) for batch in loader)


def our_epochs(options: DataOptions) -> tuple[Callable[[], int], Iterator[Any]]:
    """One epoch of a run's stream; and the stream, after its first epoch."""
    images = load_data(options).train
    stream = batch_stream(images, SEED, BATCH)
    count = len(images) // BATCH

    def epoch() -> int:
        return sum(len(next(stream).pixels) for _ in range(count))

    epoch()
    return epoch, stream


def compare_epochs(count: int, rounds: int) -> None:
    """Print the table of an epoch."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_photos(folder / "photos", count)
        options = DataOptions(
            train_data_dir=str(folder / "photos"), resolution=(SIZE, SIZE), center_crop=True, random_flip=True,
            validation_fraction=0, cache_dir=str(folder / "cache"), cache_images="always",
        )  # fmt: skip
        start = time.perf_counter()
        load_data(options)
        first = time.perf_counter() - start
        cached, stream = our_epochs(options)
        decoded = batch_stream(
            load_data(DataOptions(**vars(options) | {"cache_images": "never"}), memory_limit=0).train,
            SEED, BATCH, start_step=count // BATCH,
        )  # fmt: skip
        for _ in range(count // BATCH):
            if not torch.equal(next(stream).pixels, next(decoded).pixels):
                raise SystemExit("the cached pixels differ from those that are decoded each time")
        stock = stock_epochs(folder / "photos", folder / "datasets")
        torch.manual_seed(SEED)
        times: dict[str, list[float]] = {"stock": [], "cached": [], "decoded": []}
        epochs = {
            "stock": stock,
            "cached": cached,
            "decoded": lambda: sum(len(next(decoded).pixels) for _ in range(count // BATCH)),
        }
        for number in range(rounds):
            for kind in sorted(epochs, reverse=bool(number % 2)):
                start = time.process_time()
                epochs[kind]()
                times[kind].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(times["stock"], times["cached"], strict=True)]
    stock_s, cached_s, decoded_s = (statistics.median(times[kind]) for kind in ("stock", "cached", "decoded"))
    print(f"\n| an epoch of {count:,} JPEG, 256 x 256 to {SIZE} x {SIZE} | CPU s | images/s | stock / ours |")
    print("|---|---|---|---|")
    print(f"| `train_unconditional.py`'s DataLoader | {stock_s:.2f} | {count / stock_s:,.0f} | 1 |")
    print(f"| ours, decoded for each use | {decoded_s:.2f} | {count / decoded_s:,.0f} | {stock_s / decoded_s:.2f}x |")
    print(
        f"| ours, `--cache_images` (second epoch) | {cached_s:.3f} | {count / cached_s:,.0f} |"
        f" {statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f}) |"
    )
    print(f"\nThe first start, which builds the cache, took {first:.1f} s. Cached and decoded pixels are equal.")


# ------------------------------------------------------------------ a start


def save_rows(folder: Path, rows: int, kind: str) -> None:
    """Save small PNG images with a class each: in a parquet file, or as files in folders of 1,000."""
    import pyarrow
    import pyarrow.parquet

    draw = np.random.default_rng(SEED)
    pictures = []
    for _ in range(1000):
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(file, "PNG")
        pictures.append(file.getvalue())
    folder.mkdir(parents=True)
    if kind == "folder":
        for row in range(rows):
            if row % 1000 == 0:
                (folder / f"{row // 1000:05}").mkdir()
            (folder / f"{row // 1000:05}" / f"{row % 1000:05}.png").write_bytes(pictures[row % 1000])
        return
    schema = pyarrow.schema(
        {"image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}), "label": pyarrow.int64()},
        metadata={
            "huggingface": json.dumps(
                {"info": {"features": {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}}}
            )
        },
    )
    with pyarrow.parquet.ParquetWriter(folder / "train.parquet", schema) as writer:
        for first in range(0, rows, 1000):
            block = [{"bytes": picture, "path": None} for picture in pictures[: min(1000, rows - first)]]
            labels = [(first + number) % 10 for number in range(len(block))]
            writer.write_table(pyarrow.table({"image": block, "label": labels}, schema))


def own_memory() -> float:
    """Memory of this process in MiB, without the files that it maps, which the system drops when it needs space."""
    status = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon"))


def measure_start(folder: Path, cache: Path, kind: str) -> dict[str, float]:
    """Read the images in this process."""
    torch.set_num_threads(1)
    source = {"train_data_dir": str(folder)} if kind == "folder" else {"dataset_name": str(folder)}
    column = "folder" if kind == "folder" else "label"
    options = DataOptions(
        **source, resolution=(8, 8), class_column=column, cache_dir=str(cache), cache_images="always"
    )  # fmt: skip
    if kind == "parquet":
        import datasets  # its import is not part of a start

        datasets.disable_progress_bars()
    before = own_memory()
    start = time.process_time()
    data = load_data(options, "adm")
    stream = batch_stream(data.train, SEED, 64)
    next(stream)
    ready = time.process_time() - start
    steps = []
    for _ in range(200):
        start = time.process_time()
        next(stream)
        steps.append(time.process_time() - start)
    return {"ready": ready, "memory": own_memory() - before, "step": 1000 * statistics.median(steps)}


def compare_starts(counts: list[int], kinds: list[str], folder: Path) -> None:
    """Print the table of starts."""
    print("\n| images | | first start, s | later start, s | memory of a later start, MiB | a batch of 64, ms |")
    print("|---|---|---|---|---|---|")
    for kind in kinds:
        for rows in counts:
            place = folder / kind / str(rows)
            if not place.exists():
                save_rows(place, rows, kind)
            results = []
            for _ in range(3):
                command = [sys.executable, __file__, "measure", kind, str(place), str(folder / "cache")]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results.append(json.loads(output.splitlines()[-1]))
            first, *later = results
            best = min(later, key=lambda result: result["ready"])
            print(
                f"| {rows:,} | {kind} | {first['ready']:.2f} | {best['ready']:.2f} | {best['memory']:.0f} |"
                f" {best['step']:.2f} |",
                flush=True,
            )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    epoch = commands.add_parser("epoch")
    epoch.add_argument("--images", type=int, default=2000)
    epoch.add_argument("--rounds", type=int, default=5)
    starts = commands.add_parser("start")
    starts.add_argument("--rows", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    starts.add_argument("--kinds", nargs="+", choices=("parquet", "folder"), default=["parquet", "folder"])
    starts.add_argument("--folder", help="keep the images here")
    measure = commands.add_parser("measure")
    measure.add_argument("kind")
    measure.add_argument("folder")
    measure.add_argument("cache")
    arguments = parser.parse_args()
    if arguments.command == "epoch":
        compare_epochs(arguments.images, arguments.rounds)
    elif arguments.command == "measure":
        result = measure_start(Path(arguments.folder), Path(arguments.cache), arguments.kind)
        print(json.dumps(result))
    else:
        with tempfile.TemporaryDirectory() as name:
            compare_starts(arguments.rows, arguments.kinds, Path(arguments.folder or name))


if __name__ == "__main__":
    main()
