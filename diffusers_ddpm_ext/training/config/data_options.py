"""Options of a run's images, the section ``data``: where they are, and what is done to their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffusers_ddpm_ext.training.config.pixel_options import PixelOptions
from diffusers_ddpm_ext.utils.option import option


def as_names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """The value of an option that takes one text or several, as a tuple; empty for None."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


@dataclass(frozen=True)
class SourceOptions:
    """Where the images and their conditions are, and how they are loaded."""

    train_data_dir: str | tuple[str, ...] | None = option(
        None,
        "Folder of images of any type, including its subfolders; or several folders, which are mixed.",
        unset="digits",
        path=True,
        several=True,
    )
    dataset_name: str | tuple[str, ...] | None = option(
        None,
        "Dataset on the Hub, or a local one: a folder, a file, or a pattern of files; read by `datasets`. Several are"
        " mixed.",
        path=True,
        several=True,
    )
    dataset_config_name: str | tuple[str, ...] | None = option(
        None, "Configuration of --dataset_name, if it has several: one for all datasets, or one each.", several=True
    )
    image_column: str | tuple[str, ...] | None = option(
        None,
        "Column of --dataset_name that holds the images: one for all datasets, or one each.",
        unset="the only one",
        several=True,
    )
    dataset_weights: tuple[float, ...] | None = option(
        None,
        "How often images of each of several folders or datasets are drawn: 3 1 draws three of the first for each of"
        " the second.",
        above=0,
        unset="each image equally often",
        metavar="X",
        several=True,
    )
    class_balance: bool = option(
        False, "Draw images of each class equally often, whatever their number; see --class_column."
    )
    cache_dir: str | None = option(
        None,
        "Cache folder: of downloaded datasets, and of --cache_images in its subfolder ddpm_ext_images.",
        unset="that of `datasets`",
        path=True,
    )
    cache_images: Literal["auto", "always", "never"] = option(
        "auto",
        "Whether to keep the decoded and resized images in files, below --cache_dir, so that later epochs and runs"
        " decode none. auto: 10,000 images or more, 256 MiB of files or more, or more pixels than 2 GiB.",
        answers={"true": "use always", "false": "use never"},
    )
    validation_fraction: float | None = option(
        0.1, "Fraction of the images held out for validation. 0: no validation.", low=0, below=1
    )
    validation_split: str | None = option(None, "Split of --dataset_name to validate on, instead of a fraction.")
    validation_data_dir: str | tuple[str, ...] | None = option(
        None, "Folder of images to validate on, or several, instead of a fraction.", path=True, several=True
    )
    streaming: bool = option(
        False,
        "Read the images in order while the run trains on them: nothing is downloaded, decoded or held in memory"
        " before. The run has steps instead of epochs: --max_train_steps.",
    )
    shuffle_buffer: int = option(
        1000, "With --streaming: images that are shuffled at a time, undecoded in memory. 1: none.", low=1, high=10**8
    )
    validation_examples: int | None = option(
        None,
        "Number of images to validate on, instead of a fraction: the first ones of --validation_split or"
        " --validation_data_dir, otherwise of the training images, which are then left out; of a mixture, of each"
        " source.",
        low=1,
        high=10**7,
        unset="those of the other options; with --streaming 1000 of a split or folder, else none",
    )
    skip_bad_images: bool = option(
        False, "Skip files that cannot be read, instead of stopping with an error before training."
    )
    class_column: str | None = option(
        None,
        "Column with the class of each image: of --dataset_name, or of metadata.csv or metadata.jsonl in the folder;"
        " `folder`: the name of the folder that an image is in.",
        unset="the digit; with --conditioning_key adm or --class_balance also `folder`",
    )
    class_names: tuple[str, ...] | None = option(
        None,
        "With --streaming: names of all classes in --class_column, in the order of their numbers.",
        unset="those that the column declares, else a first pass over it finds them",
        metavar="NAME",
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

    @property
    def data_dirs(self) -> tuple[str, ...]:
        """The folders to train on; empty without any."""
        return as_names(self.train_data_dir)

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """The datasets to train on; empty without any, or if there are folders."""
        return () if self.data_dirs else as_names(self.dataset_name)


@dataclass(frozen=True)
class DataOptions(PixelOptions, SourceOptions):
    """Images. With neither --train_data_dir nor --dataset_name: the digits that ship with scikit-learn."""
