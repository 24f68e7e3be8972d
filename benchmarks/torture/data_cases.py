"""Bad inputs of image data, generated: kind by kind, each with the words that its error line must have.

| input | what it is |
|---|---|
| ``photos`` | 12 color images of 8 bits in two class folders |
| ``gray`` | 4 gray images, in no folder of a class |
| ``floats`` | 4 arrays of five float32 bands |
| ``table.parquet`` in ``table`` | 12 images with a class, a text and an array |
| ``run``, ``arrays`` | pipelines of three channels of 8 bits, and of five float32 bands |
"""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bad_arrays import ARRAY_FILES, OTHER_KINDS, npy, npz, picture
from PIL import Image

NETWORK = "--resolution 8 --block_out_channels 8 8 --layers_per_block 1 --attention_levels none --norm_num_groups 4"
LOOP = "--num_train_timesteps 20 --max_train_steps 1 --train_batch_size 4 --report_to none --lr_warmup_steps 0"
TRAIN = f"train {NETWORK} {LOOP} --ddpm_num_inference_steps 2 --output_dir new"
VAE = (
    "train-vae --resolution 8 --compression 2 --block_out_channels 8 8 --norm_num_groups 4 --max_train_steps 1"
    " --train_batch_size 4 --report_to none --output_dir new"
)


@dataclass(frozen=True)
class BadInput:
    """One input that a command must refuse.

    Attributes:
        kind: for the summary.
        name: what is bad.
        argv: the command line, in the working folder.
        says: words of its error line.
        needs: inputs that are copied into the working folder.
        write: makes the bad files there.
    """

    kind: str
    name: str
    argv: tuple[str, ...]
    says: tuple[str, ...]
    needs: tuple[str, ...] = ()
    write: Callable[[Path], None] = lambda work: None


def build_inputs(folder: Path) -> Path:
    """Make the intact inputs; returns their folder."""
    draw = np.random.default_rng(0)
    for index in range(12):
        pixels = draw.integers(0, 256, (10, 10, 3), np.uint8)
        _write(folder / "photos" / ("cat", "dog")[index % 2] / f"{index:02}.png", picture(pixels))
    for index in range(4):
        _write(folder / "gray" / f"{index}.png", picture(draw.integers(0, 256, (10, 10), np.uint8)))
        _write(folder / "floats" / f"{index}.npy", npy(draw.random((10, 10, 5), np.float32)))
    _write_table(folder / "table" / "table.parquet", draw)
    _write_pipelines(folder)
    return folder


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _write_table(path: Path, draw: np.random.Generator) -> None:
    import datasets

    images = [Image.fromarray(draw.integers(0, 256, (10, 10, 3), np.uint8)) for _ in range(12)]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"), text=datasets.Value("string"))
    rows = {"image": images, "label": [0, 1] * 6, "text": [f"a {index}" for index in range(12)]}
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def _write_pipelines(folder: Path) -> None:
    from diffusers import UNet2DModel

    from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
    from diffusers_ddpm_ext.utils.pixel_format import PixelFormat

    for name, channels in (("run", 3), ("arrays", 5)):
        network = UNet2DModel(
            sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8, 8), layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
            add_attention=False,
        )  # fmt: skip
        pipeline = DDPMExtPipeline(network, DDPMExtScheduler(20))
        if channels == 5:
            pipeline.pixel_format = PixelFormat("float32", 0.0, 1.0, ".npy")
        pipeline.save_pretrained(folder / name)


def _case(kind: str, command: str, says: str, needs: str = "", write: object = None, name: str = "") -> BadInput:
    """A case; ``says`` are words separated by `` & ``, ``needs`` by spaces."""
    written: Callable[[Path], None] = write if callable(write) else lambda work: None
    words = tuple(says.split(" & "))
    shown = name or command.replace(TRAIN, "train ...").replace(VAE, "train-vae ...")
    return BadInput(kind, shown, tuple(shlex.split(command)), words, tuple(needs.split()), written)


# ---------------------------------------------------------------- arrays and pictures


def _beside(folder: str, name: str, content: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda work: _write(work / folder / name, content())


def array_cases() -> Iterator[BadInput]:
    """Every bad file in a folder of its own, at each place where a run reads images."""
    places = {
        "train": (f"{TRAIN} --train_data_dir bad", ""),
        "train-vae": (f"{VAE} --train_data_dir bad", ""),
        "validation": (f"{TRAIN} --train_data_dir photos --validation_data_dir bad", "photos"),
        "mixture": (f"{TRAIN} --train_data_dir photos bad", "photos"),
        "evaluate": ("evaluate run --train_data_dir photos --validation_data_dir bad --num_timesteps 2", "photos run"),
    }
    for (place, (command, needs)), (name, content) in itertools.product(places.items(), ARRAY_FILES.items()):
        yield _case("arrays", command, name, needs, _beside("bad", name, content), f"{place}: {name}")
    for name, content in OTHER_KINDS.items():
        write = _beside("photos/cat", f"x-{name}", content)
        yield _case("kinds", f"{TRAIN} --train_data_dir photos", f"x-{name}", "photos", write, f"one folder: {name}")
        write = _beside("other", name, content)
        command = f"{TRAIN} --train_data_dir photos --validation_data_dir other"
        yield _case("kinds", command, name, "photos", write, f"validation: {name}")
        yield _case("kinds", f"{TRAIN} --train_data_dir photos other", name, "photos", write, f"mixture: {name}")


def key_cases() -> Iterator[BadInput]:
    """Names and layouts of arrays."""
    two = _beside("bad", "two.npz", lambda: npz(a=np.zeros((9, 9), np.uint8), b=np.zeros(3)))
    for key, says in (("c", "two.npz"), ("b", "two.npz"), ("''", "--array_key"), ("A", "two.npz")):
        yield _case("arrays", f"{TRAIN} --train_data_dir bad --array_key {key}", says, "", two)
    square = _beside("bad", "square.npy", lambda: npy(np.zeros((10, 10, 10), np.uint8)))
    yield _case("arrays", f"{TRAIN} --train_data_dir bad", "square.npy & --array_layout", "", square)
    for layout in ("chw", "channels", "first", "1"):
        yield _case("arrays", f"{TRAIN} --train_data_dir floats --array_layout {layout}", "--array_layout", "floats")
    for channels in (1, 2, 3, 4, 6):
        command = f"{TRAIN} --train_data_dir floats --channels {channels}"
        yield _case("arrays", command, "--channels", "floats")
    for channels in (0, -1, 5000, "rgb", "3.5"):
        yield _case("arrays", f"{TRAIN} --train_data_dir photos --channels {channels}", "--channels", "photos")
    yield _case("arrays", f"{TRAIN} --train_data_dir photos --channels 5", "--channels", "photos")
    yield _case("arrays", f"{TRAIN} --array_key a", "--array_key")
    yield _case("arrays", f"{TRAIN} --array_layout channels_last", "--array_layout")


# ---------------------------------------------------------------- ranges and geometry


def range_cases() -> Iterator[BadInput]:
    """Values of --data_range, and data outside of it."""
    for values in (
        "", "0", "a b", "nan 1", "0 nan", "0 inf", "-inf 1", "1 0", "1 1", "0 0", "5 -5", "0,1,2", "none 1",
        "0x10 5", "1e400 1e401", "0 1e400", "[0] [1]", "''  ''", "0 --",
    ):  # fmt: skip
        yield _case("ranges", f"{TRAIN} --train_data_dir floats --data_range {values}", "--data_range", "floats")
        yield _case("ranges", f"{VAE} --train_data_dir floats --data_range={values}", "--data_range", "floats")
    for low, high in (("0.2", "1"), ("0", "0.9"), ("-1", "0"), ("5", "6"), ("0.49999", "0.50001")):
        command = f"--train_data_dir floats --data_range {low} {high}"
        yield _case("ranges", f"{TRAIN} {command}", "--data_range & .npy", "floats")
        yield _case("ranges", f"{VAE} {command}", "--data_range & .npy", "floats")
    for low, high in (("0", "100"), ("10", "255"), ("-5", "5")):
        command = f"{TRAIN} --train_data_dir photos --data_range {low} {high}"
        yield _case("ranges", command, "--data_range & .png", "photos")
    yield _case("ranges", f"{TRAIN} --data_range 0 16", "--data_range")


def geometry_cases() -> Iterator[BadInput]:
    """Values of the options of size and position, and those that contradict each other."""
    for command in (TRAIN, VAE):
        photos = f"{command} --train_data_dir photos"
        for option, values in {
            "resize": ("cover", "fit", "''", "1", "Crop"),
            "resize_filter": ("cubic", "antialias", "3", "''", "BILINEAR"),
            "random_crop": ("maybe", "true", "0.5", "none", "both"),
            "random_crop_scale": ("1", "0 1", "1 0.5", "0.5 1.5", "-1 1", "nan 1", "a b"),
            "vertical_flip": ("2", "maybe", "vertical"),
            "rotate90": ("90", "both", "-1"),
            "background": ("purpleish", "'#12'", "'#gggggg'", "''", "'rgb(1,2)'", "'#11223344'", "'rgba(1,2,3,4)'"),
            "resolution": ("0", "-8", "8 8 8", "a", "8.5", "99999", "1e9", "''"),
        }.items():
            for value in values:
                extra = " --random_crop before" if option == "random_crop_scale" else ""
                yield _case("geometry", f"{photos} --{option} {value}{extra}", f"--{option}", "photos")
        for flags, says in {
            "--resize pad --center_crop": "--center_crop",
            "--resize stretch --center_crop": "--center_crop",
            "--random_crop before --center_crop": "--random_crop",
            "--random_crop after --center_crop": "--random_crop",
            "--random_crop before --resize pad": "--random_crop",
            "--random_crop after --resize stretch": "--random_crop",
            "--random_crop_scale 0.5 1": "--random_crop_scale",
            "--rotate90 --resolution 8 16": "--rotate90",
            "--background red --channels 4": "--background",
            "--data_range 0 1 --data_range": "--data_range",
        }.items():
            yield _case("geometry", f"{photos} {flags}", says, "photos")


# ---------------------------------------------------------------- mixtures


def mixture_cases() -> Iterator[BadInput]:
    """Names, weights and columns of several sources, and balanced classes."""
    for command, option in itertools.product((TRAIN, VAE), ("train_data_dir", "validation_data_dir")):
        base = command if option == "train_data_dir" else f"{command} --train_data_dir photos"
        for names, says in {
            "nowhere": "nowhere",
            "nowhere gray": "nowhere",
            "gray nowhere": "nowhere",
            "gray gray": "gray twice",
            "gray ./gray": "twice",
            "photos/cat photos": "photos/cat is inside",
            "photos photos/cat photos/dog": "is inside",
            "gray ''": f"--{option}",
            "''": f"--{option}",
            "gray empty": "empty",
            "gray file.txt": "file.txt is a file",
            "gray texts": "texts",
        }.items():
            yield _case("mixtures", f"{base} --{option} {names}", says, "photos gray", _odd_folders)
    photos = f"{TRAIN} --train_data_dir photos gray --channels 3"
    for weights in ("1", "1 2 3", "0 1", "1 0", "-1 1", "nan 1", "inf 1", "a b", "1e400 1", "''", "[1,2]", "1:2", ""):
        yield _case("mixtures", f"{photos} --dataset_weights {weights}", "--dataset_weights", "photos gray")
    for flags, says in {
        "--train_data_dir photos --dataset_weights 1": "--dataset_weights",
        "--dataset_weights 1 2": "--dataset_weights",
        "--train_data_dir photos gray": "--channels",
        "--train_data_dir photos gray --channels 3 --dataset_weights 1 2 --class_balance": "--class_balance",
        "--train_data_dir photos gray --channels 3 --conditioning_key adm": "gray & no class",
        "--train_data_dir photos gray --channels 3 --class_balance": "gray & no class",
        "--train_data_dir gray --class_balance": "gray & no class",
        "--train_data_dir photos/cat --class_balance": "no class",
        "--train_data_dir one --class_balance": "--class_balance & one class",
        "--train_data_dir photos --class_balance --class_column kind": "metadata",
        "--train_data_dir photos --class_balance maybe": "--class_balance",
        "--class_balance --class_column kind": "--class_column kind",
        "--train_data_dir photos --dataset_name photos": "--dataset_name",
        "--train_data_dir photos --image_column image": "--image_column",
        "--train_data_dir photos --dataset_config_name en": "--dataset_config_name",
        "--dataset_name table/table.parquet --class_balance": "--class_balance needs --class_column",
        "--dataset_name table/table.parquet --class_balance --class_column nothing": "nothing",
        "--dataset_name table/table.parquet table/table.parquet": "twice",
        "--dataset_name table/table.parquet nowhere/none.parquet": "nowhere",
        "--dataset_name table/table.parquet --image_column a b": "--image_column",
        "--dataset_name table/table.parquet --image_column nothing": "--image_column",
        "--dataset_name table/table.parquet --image_column text": "row 0",
        "--dataset_name table/table.parquet --image_column label": "label",
        "--dataset_name table/table.parquet --dataset_config_name a b c": "--dataset_config_name",
    }.items():
        yield _case("mixtures", f"{TRAIN} --cache_dir ../cache {flags}", says, "photos gray table", _one_class)
    yield _case("mixtures", f"{VAE} --train_data_dir photos --class_balance", "--class_balance", "photos")
    for flags in ("--dataset_weights 1", "--class_balance"):
        name = flags.split()[0]
        yield _case("mixtures", f"evaluate run --train_data_dir photos {flags}", f"{name} has no effect", "photos run")


def _odd_folders(work: Path) -> None:
    (work / "empty").mkdir()
    (work / "file.txt").write_text("text")
    _write(work / "texts" / "a.txt", b"text")


def _one_class(work: Path) -> None:
    shutil.copytree(work / "photos" / "cat", work / "one" / "cat")


# ---------------------------------------------------------------- metrics


def metric_cases() -> Iterator[BadInput]:
    """Options of the metrics, and samples that are none."""
    evaluate = "evaluate run --train_data_dir photos --num_inference_steps 2"
    small = f"{evaluate} --metrics kid --num_samples 4"
    for flags, says in {
        "--metrics": "--metrics",
        "--metrics fid": "--metrics fid",
        "--metrics kid kid": "--metrics kid kid",
        "--metrics kid psnr": "psnr",
        "--metrics KID": "KID",
        "--metrics ''": "--metrics",
        "--num_samples 10": "--num_samples",
        "--nearest 3": "--nearest",
        "--samples photos": "--samples",
        "--feature_extractor pixels": "--feature_extractor",
        "--scheduler DDIMScheduler": "--scheduler",
        "--memorization --nearest 3": "--nearest",
        "--metrics kid --num_samples 0": "--num_samples",
        "--metrics kid --num_samples -5": "--num_samples",
        "--metrics kid --num_samples 3": "--num_samples",
        "--metrics kid --num_samples many": "--num_samples",
        "--metrics kid --num_samples 1e3": "--num_samples",
        "--metrics kid --nearest 2 --num_samples 4": "--nearest",
        "--metrics prdc --nearest 0": "--nearest",
        "--metrics kid --confidence 0": "--confidence",
        "--metrics kid --confidence 1": "--confidence",
        "--metrics kid --confidence 95": "--confidence",
        "--metrics kid --num_timesteps 3": "--num_timesteps",
        "--metrics kid --decoder exact": "--decoder",
        "--metrics kid --scheduler Nothing --num_samples 4": "Nothing",
        "--metrics kid --scheduler UNet2DModel --num_samples 4": "UNet2DModel",
        "--metrics kid --scheduler_args beta=2 --num_samples 4": "beta",
        "--metrics kid --eta -1 --num_samples 4": "--eta",
        "--metrics kid --guidance_scale 2 --num_samples 4": "guidance_scale",
        "--metrics kid --feature_extractor nowhere/none --num_samples 4": "--feature_extractor",
        "--metrics kid --feature_extractor photos --num_samples 4": "--feature_extractor",
        "--metrics kid --feature_extractor digits --num_samples 4": "--feature_extractor",
        "--metrics kid --feature_extractor text.pt --num_samples 4": "--feature_extractor",
        "--metrics kid --feature_extractor text.pt --trust_feature_extractor --num_samples 4": "--feature_extractor",
        "--metrics kid --trust_feature_extractor --num_samples 4": "--trust_feature_extractor",
        "--metrics kid --samples nowhere": "--samples nowhere",
        "--metrics kid --samples photos --num_samples 4": "--num_samples",
        "--metrics kid --samples photos --scheduler DDIMScheduler": "--scheduler",
        "--metrics kid --samples empty": "empty",
        "--metrics kid --samples text.pt": "text.pt",
        "--metrics kid --split test": "--split",
        "--metrics kid --max_images 0": "--max_images",
        "--metrics kid --feature_cache text.pt --num_samples 4": "--feature_cache",
        "--metrics kid --out text.pt --num_samples 4": "--out",
        "--metrics kid --json photos --num_samples 4": "--json",
    }.items():
        command = evaluate.replace(" --num_inference_steps 2", "") if "--samples" in flags else evaluate
        yield _case("metrics", f"{command} {flags}", says, "photos run", _empty_and_text)
    for steps in ("0", "-1", "21", "a"):
        yield _case("metrics", f"{small} --num_inference_steps {steps}", "num_inference_steps", "photos run")
    given = "evaluate run --train_data_dir photos --metrics kid --samples bad"
    for name, content in ARRAY_FILES.items():
        if name.endswith((".npy", ".npz")) and name not in ("bool.npy",):
            command = given.replace("bad", f"bad/{name}")
            yield _case("metrics", command, name, "photos run", _beside("bad", name, content), f"--samples {name}")
    for shape in ((4, 9, 9, 3), (4, 8, 8, 1), (4, 3, 8, 8), (0, 8, 8, 3), (8, 8, 3), (4, 8, 8)):
        write = _beside("bad", "x.npy", lambda shape=shape: npy(np.zeros(shape, np.uint8)))  # type: ignore[misc]
        yield _case("metrics", f"{given}/x.npy", "x.npy", "photos run", write, f"--samples of shape {shape}")
    for flags, says in {
        "--validation_metrics fid": "--validation_metrics",
        "--validation_metrics kid kid": "--validation_metrics",
        "--validation_metrics kid --validation_samples 0": "--validation_samples",
        "--validation_metrics kid --validation_samples 11": "--validation_samples",
        "--validation_metrics kid --validation_fraction 0": "--validation_metrics",
        "--validation_metrics kid --feature_extractor nowhere/none": "--feature_extractor",
        "--validation_metrics kid --feature_extractor digits": "--feature_extractor",
        "--validation_metrics kid --trust_feature_extractor": "--trust_feature_extractor",
        "--validation_samples 100": "--validation_samples",
        "--feature_extractor pixels": "--feature_extractor",
        "--monitor val/kid": "--monitor",
        "--validation_metrics kid --monitor val/fd_ema": "--monitor",
    }.items():
        yield _case("metrics", f"{TRAIN} --train_data_dir photos --validation_fraction 0.5 {flags}", says, "photos")


def _empty_and_text(work: Path) -> None:
    (work / "empty").mkdir()
    (work / "text.pt").write_text("no TorchScript")


# ---------------------------------------------------------------- the command `data`


def inspection_cases() -> Iterator[BadInput]:
    """Options of `ddpm-ext data`, and folders without images."""
    for flags, says in {
        "": "FOLDER_OR_ID",
        "''": "FOLDER_OR_ID",
        "nowhere/none": "nowhere",
        "./nowhere": "nowhere",
        "empty": "empty",
        "texts": "texts",
        "file.txt": "file.txt",
        "photos gray": "gray",
        "photos --max_images 0": "--max_images",
        "photos --max_images -1": "--max_images",
        "photos --max_images some": "--max_images",
        "photos --max_images 1.5": "--max_images",
        "photos --out picture.jpg": "--out",
        "photos --out photos/picture.png": "--out",
        "photos --out empty": "--out",
        "photos --out file.txt/picture.png": "--out",
        "photos --json empty": "--json",
        "photos --json photos/x.json": "--json",
        "photos --json file.txt/x.json": "--json",
        "photos --json x.png --out x.png": "--json",
        "photos --validation_data_dir nowhere": "nowhere",
        "photos --validation_data_dir empty": "empty",
        "photos --validation_data_dir gray --validation_split test": "--validation_split",
        "photos --validation_split test": "--validation_split",
        "photos --image_column image": "--image_column",
        "photos --dataset_config_name en": "--dataset_config_name",
        "photos --class_column kind": "metadata.csv",
        "photos --resolution 8": "--resolution",
        "photos --unknown": "--unknown",
        "table/table.parquet --cache_dir ../cache --image_column nothing": "nothing",
        "table/table.parquet --cache_dir ../cache --class_column nothing": "nothing",
        "table/table.parquet --cache_dir ../cache --validation_split nothing": "nothing",
        "table/none.parquet --cache_dir ../cache": "none.parquet",
    }.items():
        yield _case("data", f"data {flags}", says, "photos gray table", _odd_folders)


# ---------------------------------------------------------------- caches


def cache_cases() -> Iterator[BadInput]:
    """Values of --cache_images, and places that cannot hold a cache."""
    photos = f"{TRAIN} --train_data_dir photos"
    for value in ("maybe", "1", "true", "''", "Always", "off"):
        yield _case("caches", f"{photos} --cache_images {value}", "--cache_images", "photos")
    for place in ("file.txt", "file.txt/cache", "/dev/null", "/proc/cache", "$'a\\x00b'", "''"):
        if "x00" in place:
            continue
        command = f"{photos} --cache_images always --cache_dir {place}"
        yield _case("caches", command, "--cache_dir", "photos", _odd_folders)
    yield _case("caches", f"{TRAIN} --cache_images always", "--cache_images")


# ---------------------------------------------------------------- streams


def stream_cases() -> Iterator[BadInput]:
    """Options that a stream has no use for, and files that are no stream."""
    base = f"{TRAIN} --streaming --cache_dir ../cache"
    for flags, says in {
        "": "--streaming needs",
        "--train_data_dir nowhere": "nowhere",
        "--train_data_dir empty": "empty",
        "--train_data_dir texts": "texts",
        "--train_data_dir file.txt": "file.txt",
        "--train_data_dir photos --num_epochs 3": "--num_epochs",
        "--train_data_dir photos --validation_fraction 0.1": "--validation_fraction",
        "--train_data_dir photos --save_images_epochs 1": "--save_images_epochs",
        "--train_data_dir photos --save_model_epochs 1": "--save_model_epochs",
        "--train_data_dir photos --class_balance": "--class_balance",
        "--train_data_dir photos --cache_images always": "--cache_images",
        "--train_data_dir photos --shuffle_buffer 0": "--shuffle_buffer",
        "--train_data_dir photos --shuffle_buffer -1": "--shuffle_buffer",
        "--train_data_dir photos --shuffle_buffer all": "--shuffle_buffer",
        "--train_data_dir photos --validation_examples 0": "--validation_examples",
        "--train_data_dir photos --validation_examples -1": "--validation_examples",
        "--train_data_dir photos --validation_examples half": "--validation_examples",
        "--train_data_dir photos --validation_examples 12": "--validation_examples",
        "--train_data_dir photos --validation_examples 1000": "--validation_examples",
        "--train_data_dir photos --class_names a b": "--class_names",
        "--train_data_dir photos --class_column folder": "--class_column",
        "--train_data_dir photos --class_column kind --conditioning_key adm": "metadata",
        "--train_data_dir photos --conditioning_key adm --class_column folder --class_names cat cat": "--class_names",
        "--train_data_dir photos --conditioning_key adm --class_column folder --class_names cat": "dog",
        "--train_data_dir photos --conditioning_key adm --class_column folder --class_names cat ''": "--class_names",
        "--train_data_dir gray --conditioning_key adm": "no class",
        "--train_data_dir photos --concat_column x --conditioning_key concat": "--concat_column",
        "--train_data_dir photos --validation_bpd": "--validation_bpd",
        "--train_data_dir photos --validation_metrics kid": "--validation_metrics",
        "--train_data_dir photos --validation_data_dir gray": "differ in channels",
        "--train_data_dir photos gray --channels 3": "--dataset_weights",
        "--train_data_dir photos gray --dataset_weights 1": "--dataset_weights",
        "--train_data_dir photos gray --dataset_weights 1 0": "--dataset_weights",
        "--train_data_dir photos gray --dataset_weights 1 1": "channels",
        "--dataset_name table/none.parquet": "none.parquet",
        "--dataset_name 'table/*.tar'": "table/*.tar",
        "--dataset_name bad/x.parquet": "bad/x.parquet",
        "--dataset_name bad/empty.parquet": "bad/empty.parquet",
        "--dataset_name bad/x.tar": "bad/x.tar",
        "--dataset_name bad/x.arrow": "bad/x.arrow",
        "--dataset_name table/table.parquet --image_column nothing": "nothing",
        "--dataset_name table/table.parquet --image_column label": "label",
        "--dataset_name table/table.parquet --image_column text": "row 0",
        "--dataset_name table/table.parquet --validation_split nothing": "nothing",
        "--dataset_name table/table.parquet --conditioning_key adm": "--class_column",
        "--dataset_name table/table.parquet --conditioning_key adm --class_column nothing": "nothing",
        "--dataset_name table/table.parquet --conditioning_key adm --class_column label --class_names a": "label",
        "--dataset_name table/table.parquet --validation_examples 12": "--validation_examples",
    }.items():
        yield _case("streams", f"{base} {flags}", says, "photos gray table", _bad_files)
    for flags in ("--class_names a b", "--shuffle_buffer 5"):
        yield _case("streams", f"{TRAIN} --train_data_dir photos {flags}", flags.split()[0], "photos")
    yield _case(
        "streams", f"{base.replace('--max_train_steps 1 ', '')} --train_data_dir photos", "--max_train_steps", "photos"
    )
    for name in (
        "empty.png",
        "text.png",
        "truncated.png",
        "nan.npy",
        "above-one.npy",
        "complex.npy",
        "two-arrays.npz",
    ):
        write = _beside("bad", name, ARRAY_FILES[name])
        yield _case("streams", f"{base} --train_data_dir bad", name, "", write, f"a stream of {name}")
    for name, content in OTHER_KINDS.items():
        write = _beside("photos/cat", f"x-{name}", content)
        yield _case(
            "streams", f"{base} --train_data_dir photos", f"x-{name}", "photos", write, f"a stream with {name}"
        )


def _bad_files(work: Path) -> None:
    _odd_folders(work)
    _write(work / "bad" / "x.parquet", b"PAR1 no parquet PAR1")
    _write(work / "bad" / "empty.parquet", b"")
    _write(work / "bad" / "x.tar", b"no tar")
    _write(work / "bad" / "x.arrow", b"ARROW1 no arrow")


# ---------------------------------------------------------------- few steps


def step_cases() -> Iterator[BadInput]:
    """Options of `fit-steps`, and of the commands that take its steps."""
    for flags, says in {
        "": "FOLDER",
        "nowhere": "nowhere",
        "photos": "photos",
        "file.txt": "file.txt",
        "empty": "empty",
        "run --num_inference_steps": "--num_inference_steps",
        "run --num_inference_steps 0": "--num_inference_steps",
        "run --num_inference_steps -5": "--num_inference_steps",
        "run --num_inference_steps 5.5": "--num_inference_steps",
        "run --num_inference_steps many": "--num_inference_steps",
        "run --num_inference_steps 5 5": "--num_inference_steps",
        "run --num_inference_steps 21": "21",
        "run --num_inference_steps 1000": "--num_inference_steps",
        "run --num_inference_steps 5 --reference_steps 5": "--reference_steps",
        "run --num_inference_steps 5 --reference_steps 1": "--reference_steps",
        "run --num_inference_steps 5 --reference_steps 100": "--reference_steps",
        "run --num_inference_steps 5 --num_trajectories 0": "--num_trajectories",
        "run --num_inference_steps 5 --batch_size 0": "--batch_size",
        "run --num_inference_steps 5 --seed -1": "--seed",
        "run --num_inference_steps 5 --scheduler Nothing": "Nothing",
        "run --num_inference_steps 5 --scheduler UNet2DModel": "UNet2DModel",
        "run --num_inference_steps 5 --scheduler DDPMScheduler": "draws noise",
        "run --num_inference_steps 5 --scheduler_args beta=1": "beta",
        "run --num_inference_steps 5 --scheduler_args eta": "eta",
        "run --num_inference_steps 5 --guidance_scale 2": "guidance_scale",
        "run --num_inference_steps 5 --class_labels 1": "class_labels",
        "run --num_inference_steps 5 --prompt cat": "prompt",
        "run --num_inference_steps 5 --device nothing": "nothing",
        "run --num_inference_steps 5 --dtype int8": "--dtype",
        "run --timesteps samples": "--timesteps",
        "run --undo": "--undo",
    }.items():
        yield _case("steps", f"fit-steps {flags}", says, "run photos", _odd_folders)
    sample = "sample run --num_images 2 --out out.png"
    for flags, says in {
        "--timesteps samples": "--timesteps samples",
        "--timesteps bound": "--timesteps bound",
        "--timesteps best": "--timesteps",
        "--timesteps samples --num_inference_steps 5": "fit-steps",
        "--timesteps bound --num_inference_steps 5": "fit-variance",
        "--timesteps samples --num_inference_steps 5 --scheduler DDIMScheduler": "fit-steps",
        "--timesteps even --optimal_timesteps": "--optimal_timesteps",
        "--num_inference_steps 0": "--num_inference_steps",
        "--num_inference_steps 21": "num_inference_steps",
    }.items():
        yield _case("steps", f"{sample} {flags}", says, "run")
        if "samples" in flags or "bound" in flags:
            command = f"evaluate run --train_data_dir photos --metrics kid --num_samples 4 {flags}"
            yield _case("steps", command, says, "run photos")


# ---------------------------------------------------------------- samples in the type of the data


def output_cases() -> Iterator[BadInput]:
    """Places and formats of samples, shown channels, and records of the data's type that no run writes."""
    for folder, flags, says in (
        ("run", "--out x.xyz", "--out"),
        ("run", "--out x.jpeg2000", "--out"),
        ("run", "--out run", "run"),
        ("run", "--out out --format bmp", "--format"),
        ("run", "--out x.npy --format png", "--format"),
        ("run", "--out x.png --bit_depth 16", "--bit_depth"),
        ("run", "--out x.npy --bit_depth 12", "--bit_depth"),
        ("run", "--out x.npy --preview_channels 0", "--preview_channels"),
        ("run", "--out x.png --preview_channels 3", "--preview_channels"),
        ("run", "--out x.png --preview_channels 0 1", "--preview_channels"),
        ("run", "--out x.png --preview_channels -1", "--preview_channels"),
        ("run", "--out x.png --preview_channels red", "--preview_channels"),
        ("arrays", "--out x.png --preview_channels 5", "--preview_channels"),
        ("arrays", "--out x.png --preview_channels 0 1", "--preview_channels"),
        ("arrays", "--out x.png --preview_channels 0 1 2 3", "--preview_channels"),
        ("arrays", "--out x.png --preview_channels 0 1 99", "--preview_channels"),
        ("arrays", "--out out --format png", "--format npy"),
    ):
        yield _case("outputs", f"sample {folder} --num_images 2 --num_inference_steps 2 {flags}", says, folder)
    for channels in ("-1", "a", "0 1", "0 1 2 3", "7", "0 1 9", "1.5", "''"):
        command = f"{TRAIN} --train_data_dir floats --preview_channels {channels}"
        yield _case("outputs", command, "--preview_channels", "floats")
    for name, record in {
        "a dtype": {"dtype": "complex64"}, "no dtype": {"dtype": None}, "a range": {"low": 1.0, "high": 0.0},
        "NaN": {"low": float("nan")}, "infinity": {"high": float("inf")}, "text": {"high": "much"},
        "a suffix": {"suffix": ".exe"}, "channels": {"preview_channels": [9, 9, 9]}, "another key": {"unknown": 1},
        "components": {"preview_channels": "red"},
    }.items():  # fmt: skip
        write = _changed_format(record)
        command = "sample arrays --num_images 2 --num_inference_steps 2 --out x.npy"
        yield _case("outputs", command, "model_index.json", "arrays", write, f"model_index.json with {name}")


def _changed_format(record: dict[str, object]) -> Callable[[Path], None]:
    def write(work: Path) -> None:
        path = work / "arrays" / "model_index.json"
        index = json.loads(path.read_text())
        index["pixel_format"] = index["pixel_format"] | record
        path.write_text(json.dumps(index))

    return write


KINDS: tuple[Callable[[], Iterator[BadInput]], ...] = (
    array_cases,
    key_cases,
    range_cases,
    geometry_cases,
    mixture_cases,
    metric_cases,
    inspection_cases,
    cache_cases,
    stream_cases,
    step_cases,
    output_cases,
)


def all_cases() -> list[BadInput]:
    """Every case, by kind."""
    return [case for cases in KINDS for case in cases()]
