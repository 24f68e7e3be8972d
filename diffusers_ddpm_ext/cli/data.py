"""`ddpm-ext data`: what a set of images holds, and the flags of `ddpm-ext train` that fit it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffusers_ddpm_ext.cli.arguments import check_output_file, check_result_file
from diffusers_ddpm_ext.cli.extras import require_modules
from diffusers_ddpm_ext.cli.parser import parse_options
from diffusers_ddpm_ext.errors import ConfigError, RunError, as_run_error, print_lines, printable
from diffusers_ddpm_ext.utils.option import option, positional

if TYPE_CHECKING:
    from diffusers_ddpm_ext.training.data.inspection.report import Inspection
    from diffusers_ddpm_ext.training.data.inspection.suggestion import Origin
    from diffusers_ddpm_ext.training.data.sources import DatasetSource, FolderSource

DATA_EXAMPLES = """examples:
  ddpm-ext data photos                                     a table, and photos-data.png
  ddpm-ext data photos --validation_data_dir held_out      also: are validation images in the training images
  ddpm-ext data user/dataset --image_column image --validation_split test
  ddpm-ext data photos --max_images 10000 --json photos.json

Every image is read once. Nothing in the folder is changed. The status is 1 where images cannot be trained on (they
cannot be read, or have NaN or infinity), 2 if none can be read: they are listed with the reason."""


@dataclass(frozen=True)
class InspectOptions:
    """What a set of images holds: sizes, channels, values, classes, faults, duplicates; and the flags that fit it.

    Prints a table with a complete command for `ddpm-ext train`, and draws a picture: some of the images, histograms,
    sizes, classes, and pairs that look the same.
    """

    folder: str = positional(
        "FOLDER_OR_ID", "Folder of images, or a dataset: its folder on this machine, or its id on the Hub.", path=True
    )
    validation_data_dir: str | None = option(
        None, "Folder of images to validate on: which of them are training images, too?", path=True
    )
    validation_split: str | None = option(None, "The same for a split of the dataset.")
    dataset_config_name: str | None = option(None, "Configuration of the dataset, if it has several.")
    image_column: str | None = option(None, "Column of the dataset that holds the images.", unset="the only one")
    cache_dir: str | None = option(None, "Cache folder of downloaded datasets.", unset="that of `datasets`", path=True)
    class_column: str | None = option(
        None, "Column with the class of each image, as for `ddpm-ext train`.", unset="all that look like classes"
    )
    array_key: str | None = option(
        None, "Name of the array with the image in .npz files, as for `ddpm-ext train`.", unset="the only image"
    )
    array_layout: Literal["channels_last", "channels_first"] | None = option(
        None, "Axes of arrays with three axes, as for `ddpm-ext train`.", unset="found by the first image"
    )
    data_range: tuple[float, float] | None = option(
        None,
        "Values that become -1 and 1 in the model, as for `ddpm-ext train`: an image with others is a fault.",
        unset="any",
        metavar="LOW HIGH",
    )
    max_images: int | None = option(
        None,
        "Read at most N images of each set, evenly spaced. Numbers are then those of the part, and broken or duplicate"
        " files among the others are not found.",
        low=1,
        unset="all",
        metavar="N",
    )
    json: Path | None = option(None, "Also write all numbers to this file, as JSON.", metavar="FILE.json")
    out: Path | None = option(None, "The picture.", metavar="FILE.png", unset="NAME-data.png in the current folder")

    @property
    def name(self) -> str:
        """Name of the folder or dataset, for names of files."""
        path = Path(self.folder)
        last = path.resolve().name if path.is_dir() else path.stem
        return re.sub(r"[^\w.-]+", "-", last).strip("-.")[:100] or "images"

    @property
    def picture(self) -> Path:
        """Path of the picture: ``--out``, or its default."""
        return Path(f"{self.name}-data.png") if self.out is None else self.out


def data_command(argv: Sequence[str]) -> str:
    """Run `ddpm-ext data`.

    Raises:
        ConfigError: an option is wrong, or no image can be read; nothing is written.
        RunError: images cannot be trained on; everything has been printed and written.
    """
    options = parse_data_args(argv)
    require_modules({"matplotlib": "matplotlib", "tqdm": "tqdm"})
    inspection = inspect(options)
    from diffusers_ddpm_ext.cli.data_picture import draw_inspection
    from diffusers_ddpm_ext.cli.data_table import table
    from diffusers_ddpm_ext.utils.files import write_text_atomically

    print_lines(table(inspection))
    _check_readable(inspection)
    with as_run_error(options.picture):
        draw_inspection(options.name, inspection, options.picture)
        print_lines(f"\npicture: {options.picture}\n")
        if options.json is not None:
            write_text_atomically(
                options.json, json.dumps(inspection.to_dict(), indent=2, allow_nan=False) + "\n", False
            )
    _check_faults(inspection)
    return ""


def parse_data_args(argv: Sequence[str]) -> InspectOptions:
    """The options of a command line, checked; errors are those of `parse_options`."""
    options = parse_options(InspectOptions, argv, "data", DATA_EXAMPLES)
    if options.validation_data_dir is not None and options.validation_split is not None:
        raise ConfigError("--validation_split contradicts --validation_data_dir: give one of them")
    if options.data_range is not None and not options.data_range[0] < options.data_range[1]:
        low, high = options.data_range
        raise ConfigError(f"--data_range {low:g} {high:g}: the first number must be smaller than the second")
    check_output_file("--out", options.picture, (".png",))
    if options.json is not None:
        check_result_file("--json", options.json, ("suggestions",))
    for flag, path in (("--out", options.picture), ("--json", options.json)):
        if path is None:
            continue
        for folder in (options.folder, options.validation_data_dir):
            if (
                folder is not None
                and Path(folder).is_dir()
                and path.absolute().resolve().is_relative_to(Path(folder).resolve())
            ):
                raise ConfigError(
                    f"{flag} {printable(str(path), 300)} is in the folder of images: name a place outside of it"
                )
    return options


def inspect(options: InspectOptions) -> Inspection:
    """Read the images that the options select.

    Raises:
        ConfigError: there are none.
    """
    from diffusers_ddpm_ext.training.data.array_images import ArrayReading
    from diffusers_ddpm_ext.training.data.inspection.advice import advise
    from diffusers_ddpm_ext.training.data.inspection.array_choice import choose_reading
    from diffusers_ddpm_ext.training.data.inspection.classes import find_classes
    from diffusers_ddpm_ext.training.data.inspection.duplicates import find_duplicates
    from diffusers_ddpm_ext.training.data.inspection.inspect import inspect_source
    from diffusers_ddpm_ext.training.data.inspection.report import Inspection
    from diffusers_ddpm_ext.training.data.inspection.suggestions import suggest
    from diffusers_ddpm_ext.training.data.sources import FolderSource

    source, validation, origin = _open(options)
    sources = [source] if validation is None else [source, validation]
    reading = choose_reading(source, ArrayReading(options.array_key, options.array_layout, options.data_range))
    classes, faults = find_classes(source, validation, options.class_column)
    summaries = [inspect_source(each, reading, options.max_images, progress=True) for each in sources]
    duplicates = find_duplicates(sources, summaries, progress=True)
    usable = [each for each in classes if validation is None or each.validation is not None]
    not_read = [each.other_files if isinstance(each, FolderSource) else {} for each in sources]
    inspection = Inspection(sources, summaries, not_read, duplicates, classes, faults)
    if not summaries[0].num_readable:
        return inspection
    suggestions = suggest(origin, summaries, usable[0] if usable else None)
    return replace(inspection, suggestions=suggestions, advice=advise(summaries, duplicates))


def _open(options: InspectOptions) -> tuple[FolderSource | DatasetSource, FolderSource | DatasetSource | None, Origin]:
    """The training images, the validation images, and the flags of `ddpm-ext train` that select them."""
    from diffusers_ddpm_ext.training.data.inspection.suggestion import Origin, plain_number
    from diffusers_ddpm_ext.training.data.sources import open_dataset_split, scan_folder

    name = options.folder
    if not _is_dataset(name):
        for flag in ("dataset_config_name", "image_column", "cache_dir", "validation_split"):
            if getattr(options, flag) is not None:
                raise ConfigError(
                    f"--{flag} is for datasets, and {printable(name, 300)} is a folder of images: leave it out"
                )
        flags = [("train_data_dir", name), ("validation_data_dir", options.validation_data_dir)]
        source: FolderSource | DatasetSource = scan_folder("the folder", name)
    else:
        require_modules({"datasets": "datasets"}, "hub-datasets")
        columns = ("dataset_config_name", "image_column", "cache_dir", "validation_split", "validation_data_dir")
        flags = [("dataset_name", name), *((flag, getattr(options, flag)) for flag in columns)]
        arguments = (options.dataset_config_name, options.image_column, options.cache_dir)
        try:
            source = open_dataset_split(name, "train", *arguments)
        except ConfigError as error:
            if Path(name).exists() or "/" in name:
                raise
            raise ConfigError(f"there is no folder {printable(name, 300)} here; {error}") from None
    validation: FolderSource | DatasetSource | None = None
    if options.validation_data_dir is not None:
        validation = scan_folder("--validation_data_dir", options.validation_data_dir)
    elif options.validation_split is not None:
        validation = open_dataset_split(name, options.validation_split, *arguments)
    flags += [(flag, getattr(options, flag)) for flag in ("array_key", "array_layout")]
    given: list[tuple[str, tuple[str, ...]]] = [(flag, (value,)) for flag, value in flags if value is not None]
    if options.data_range is not None:
        given.append(("data_range", tuple(map(plain_number, options.data_range))))
    return source, validation, Origin(options.name, given)


def _is_dataset(name: str) -> bool:
    """Whether a name is that of a dataset: one of `datasets` on this machine, or an id on the Hub.

    Raises:
        ConfigError: it is neither that nor a folder.
    """
    from diffusers_ddpm_ext.training.data.dataset_files import BUILDERS, builder_arguments, is_saved_dataset
    from diffusers_ddpm_ext.training.data.image_files import find_files, first_image

    path = Path(name)
    if path.is_dir():
        if is_saved_dataset(name):
            return True
        if first_image(path) is not None:
            return False
        found = find_files(path, ())
        return not found.images and not BUILDERS.keys().isdisjoint(found.other_files)
    if builder_arguments(name)[1] is not None:
        return True
    if path.exists():
        raise ConfigError(f"{printable(name, 300)} is a file: name the folder that it is in")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name, re.ASCII):
        raise ConfigError(f"{printable(name, 300)} does not exist: name a folder of images, or a dataset on the Hub")
    return True


def _check_readable(inspection: Inspection) -> None:
    """Raise ConfigError if no training image can be read."""
    first = inspection.summaries[0]
    if not first.num_readable:
        name, reason = (first.unreadable.names + first.not_finite.names)[0]
        column = getattr(inspection.sources[0], "image_column", None)
        where = "" if column is None else f", column {printable(column, 60)!r},"
        raise ConfigError(
            f"no image of {first.option}{where} can be read: the first is {printable(name, 200)} ({reason})"
        )


def _check_faults(inspection: Inspection) -> None:
    """Raise RunError if there are images that cannot be trained on."""
    unreadable = sum(summary.unreadable.count for summary in inspection.summaries)
    not_finite = sum(summary.not_finite.count for summary in inspection.summaries)
    faults = [f"{unreadable:,} unreadable"] if unreadable else []
    faults += [f"{not_finite:,} with NaN or infinity"] if not_finite else []
    if faults:
        raise RunError(f"there are images that cannot be trained on: {', '.join(faults)}; see above")
