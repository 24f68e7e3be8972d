"""Text encoder of a run: the cache of its embeddings, and its part of the printed plan."""

from __future__ import annotations

from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.training.config.condition_checks import TEXT_FILES
from diffusers_ddpm_ext.training.config.text_options import TEXT_CACHE
from diffusers_ddpm_ext.training.data.sources import FOLDER_COLUMN
from diffusers_ddpm_ext.training.data.text_cache import cache_embeddings
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.training.tracking.plan import format_bytes


def open_text_cache(setup: Setup) -> None:
    """Open the cache of the captions' embeddings where they are too large for memory. Collective call."""
    encoder, options = setup.captions, setup.config.text
    if encoder is not None and options.cache_text_embeddings and not encoder.keeps_embeddings:
        encoder.store = cache_embeddings(TEXT_CACHE, encoder, setup.accelerator)


def describe_text_encoder(setup: Setup) -> list[tuple[str, str]]:
    """Rows of the printed plan on the text encoder and its captions; none for a run without."""
    encoder, options = setup.captions, setup.config.text
    if encoder is None or encoder.table is None:
        return []
    weights = list(encoder.module.parameters())
    count, size = sum(w.numel() for w in weights), sum(w.numel() * w.element_size() for w in weights)
    source = f" of {printable(str(options.text_encoder), 200)}" if options.text_encoder else ""
    source += f"/{options.text_encoder_subfolder}" if options.text_encoder_subfolder else ""
    tokens, width = encoder.shape
    name, fate = type(encoder.module).__name__, "trained" if encoder.is_trained else "frozen"
    captions = f"{_describe_captions(setup, len(encoder.table) - 1)}, {tokens} tokens of width {width}"
    if not encoder.is_trained:
        place = "in memory" if encoder.keeps_embeddings else f"in {TEXT_CACHE}"
        cached = f"encoded once, {format_bytes(encoder.nbytes)} {place}"
        captions += f", {cached if options.cache_text_embeddings else 'encoded each time'}"
    return [
        ("text encoder", f"{name}{source}, {count:,} parameters ({format_bytes(size)}), {fate}"),
        ("captions", captions),
    ]


def _describe_captions(setup: Setup, different: int) -> str:
    """How many captions there are, and where they are from."""
    column = str(setup.config.data.caption_column)
    origin = f"column {printable(column, 60)}"
    if setup.config.data.train_data_dir is not None:
        origin = {TEXT_FILES: "the text files", FOLDER_COLUMN: "the names of folders"}.get(column, origin)
    columns = setup.data.train.columns
    most = 1 if columns is None or columns.captions is None else columns.captions.most_per_image
    several = f", up to {most:,} per image" if most > 1 else ""
    return f"{different:,} different ones of {origin}{several}"
