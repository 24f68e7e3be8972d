"""Options of a run's images, the section ``data``: where they are, and what is done to their pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers_ddpm_ext.training.config.pixel_options import PixelOptions
from diffusers_ddpm_ext.utils.option import option


@dataclass(frozen=True)
class SourceOptions:
    """Where the images and their conditions are, and how they are loaded."""

    train_data_dir: str | None = option(
        None, "Folder of images of any type, including its subfolders.", unset="digits", path=True
    )
    dataset_name: str | None = option(
        None, "Dataset on the Hub, or a local one: a folder, a file, or a pattern of files; read by `datasets`.", path=True
    )
    dataset_config_name: str | None = option(None, "Configuration of --dataset_name, if it has several.")
    image_column: str | None = option(None, "Column of --dataset_name that holds the images.", unset="the only one")
    cache_dir: str | None = option(None, "Cache folder of downloaded datasets.", unset="that of `datasets`", path=True)
    validation_fraction: float | None = option(
        0.1, "Fraction of the images held out for validation. 0: no validation.", low=0, below=1
    )
    validation_split: str | None = option(None, "Split of --dataset_name to validate on, instead of a fraction.")
    validation_data_dir: str | None = option(
        None, "Folder of images to validate on, instead of a fraction.", path=True
    )
    skip_bad_images: bool = option(
        False, "Skip files that cannot be read, instead of stopping with an error before training."
    )
    class_column: str | None = option(
        None,
        "Column with the class of each image: of --dataset_name, or of metadata.csv or metadata.jsonl in the folder;"
        " `folder`: the name of the folder that an image is in.",
        unset="the digit; with --conditioning_key adm also `folder`",
    )
    concat_column: str | None = option(
        None, "Column with images, or paths of images, that are concatenated to the input."
    )
    context_column: str | None = option(
        None, "Column with stored embeddings (tokens, width) for cross attention: .npy, .safetensors or lists."
    )
    caption_column: str | None = option(
        None,
        "Column with the caption of each image, or a list of captions, one of which is drawn in each epoch; see"
        " --text_encoder. In a folder also `txt`: the text file beside each image, a caption in each line; `folder`:"
        " the name of the folder that it is in.",
    )
    conditioning_dropout: dict[str, Any] | None = option(
        None,
        "Probability of dropping a condition, for classifier-free guidance (CompVis' `ucg_training`): a JSON object"
        ' (\'{"class_labels": 0.1}\', or \'{"concat_inputs": {"p": 0.1, "val": 0}}\'). Class labels get a null class,'
        " captions become the empty prompt.",
        unset="never",
    )
    dataloader_num_workers: int = option(
        0, "Worker processes that load images. 0: the main process loads them.", low=0, high=1024
    )


@dataclass(frozen=True)
class DataOptions(PixelOptions, SourceOptions):
    """Images. With neither --train_data_dir nor --dataset_name: the digits that ship with scikit-learn."""
