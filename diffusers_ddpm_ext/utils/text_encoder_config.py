"""What the JSON files of a pipeline say about its text encoder, without building it: class, width, tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.first_stage_config import names_class
from diffusers_ddpm_ext.utils.input_files import JsonObject, read_json_object

TEXT_ENCODER_SLOTS = ("text_encoder", "bert")
TOKENIZER_SLOT = "tokenizer"
MAX_VOCABULARY, MAX_POSITIONS, MAX_WIDTH = 10**7, 10**6, 2**16


@dataclass(frozen=True)
class TextEncoderConfig:
    """The configuration of the network between prompts and tokens of cross attention.

    Attributes:
        slot: its name in the pipeline, and its folder.
        class_name: as recorded, for messages.
        config: its ``config.json``.
        has_tokenizer: whether the pipeline has a tokenizer too; without one it takes token ids alone.
    """

    slot: str
    class_name: str
    config: JsonObject
    has_tokenizer: bool

    @property
    def width(self) -> int:
        """Width of a token of its output."""
        return self.config.integer("hidden_size" if "hidden_size" in self.config else "d_model", 1, MAX_WIDTH)

    @property
    def vocab_size(self) -> int:
        """Rows of its table of tokens."""
        return self.config.integer("vocab_size", 1, MAX_VOCABULARY)

    @property
    def positions(self) -> int | None:
        """The largest number of tokens that it takes; None where it has no table of positions."""
        key = "max_position_embeddings"
        return None if self.config.content.get(key) is None else self.config.integer(key, 1, MAX_POSITIONS)

    def describe(self) -> str:
        """Class, tokens and width in one phrase; ConfigError if one of them is damaged."""
        tokens = "tokens" if self.positions is None else f"{self.positions} tokens"
        return f"{self.class_name}: {tokens} of {self.width} values, from a table of {self.vocab_size:,}"


def read_text_encoder_config(folder: Path, index: JsonObject) -> TextEncoderConfig | None:
    """The text encoder in a pipeline's folder; None where its ``model_index.json`` names none.

    Args:
        folder: of the pipeline.
        index: its ``model_index.json``.

    Raises:
        ConfigError: there are two, its configuration is missing or damaged, or there is a tokenizer alone.
    """
    slots = [slot for slot in TEXT_ENCODER_SLOTS if names_class(index.content.get(slot))]
    has_tokenizer = names_class(index.content.get(TOKENIZER_SLOT))
    if len(slots) > 1:
        raise ConfigError(
            f"{index.name} names a text_encoder and a bert: a pipeline has one text encoder, so remove one of them"
        )
    if not slots:
        return None
    for name in (slots[0], *([TOKENIZER_SLOT] if has_tokenizer else [])):
        if not (folder / name).is_dir():
            raise ConfigError(
                f"{index.name} names a {name}, and {printable(str(folder / name), 300)} is missing: copy the folder "
                "again"
            )
    config = read_json_object(folder / slots[0] / "config.json")
    return TextEncoderConfig(slots[0], str(index.content[slots[0]][1]), config, has_tokenizer)
