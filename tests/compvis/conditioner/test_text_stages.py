"""Text encoders of the original's classes against recorded numbers of them, and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers.published_models import samples_of, seeded_tensor
from helpers.text_stages import SHAPES, recorded, seeded_stage, token_ids
from torch import Tensor

from diffusers_ddpm_ext.compvis.conditioner.architecture import read_conditioner
from diffusers_ddpm_ext.compvis.conditioner.kinds import ConditionerConfig, ConvertedConditioner
from diffusers_ddpm_ext.compvis.conditioner.weights import convert_conditioner, export_conditioner
from diffusers_ddpm_ext.models.text_encoder import TextEncoder
from diffusers_ddpm_ext.models.text_encoder_saving import save_encoder

RECORDED = recorded()
CLIP, OPEN_CLIP, BERT, T5 = "clip 1", "open_clip 1", "bert 1", "t5 1"


def config_of(name: str, **params: Any) -> ConditionerConfig:
    shape = SHAPES[name]
    section = shape.section | {"params": shape.section["params"] | params}
    config = read_conditioner(section, "model.params.cond_stage_config")
    assert config is not None
    return shape.with_heads(config)


def tensors_of(name: str) -> dict[str, Tensor]:
    return seeded_stage(RECORDED[name]["shapes"])


def convert(name: str, tensors: dict[str, Tensor] | None = None, **params: Any) -> ConvertedConditioner:
    return convert_conditioner(tensors_of(name) if tensors is None else tensors, config_of(name, **params))


def assert_same(back: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    assert back.keys() == source.keys()
    assert [
        key for key in source if not torch.equal(back[key], source[key]) or back[key].dtype != source[key].dtype
    ] == []


@pytest.mark.parametrize("name", SHAPES)
def test_tokens_are_those_of_the_original_class(name):
    converted = convert(name)
    tokens = TextEncoder(converted.module).encode(token_ids(SHAPES[name]))
    assert samples_of(tokens) == pytest.approx(RECORDED[name]["tokens"], abs=1e-6)
    assert not converted.module.training
    assert not any(parameter.requires_grad for parameter in converted.module.parameters())
    source = tensors_of(name)
    assert len({row.source for row in converted.rows} | set(converted.plan.left_out)) == len(source)
    assert_same(export_conditioner(converted.module, SHAPES[name].name, converted.plan.layout, source), source)


@pytest.mark.parametrize("inner", ["", "text_model."])
@pytest.mark.parametrize("positions", [None, torch.int64, torch.float32])
def test_names_of_all_releases_of_transformers(inner, positions):
    """Releases before 4.31 save the positions; those before 5 have ``text_model.`` in front."""
    plain = {f"transformer.{inner}{k.removeprefix('transformer.').removeprefix('text_model.')}": tensor
             for k, tensor in tensors_of(CLIP).items()}  # fmt: skip
    if positions is not None:
        plain[f"transformer.{inner}embeddings.position_ids"] = torch.arange(77)[None].to(positions)
    converted = convert(CLIP, plain)
    tokens = TextEncoder(converted.module).encode(token_ids(SHAPES[CLIP]))
    assert samples_of(tokens) == pytest.approx(RECORDED[CLIP]["tokens"], abs=1e-6)
    layout = json.loads(json.dumps(converted.plan.layout))
    assert_same(export_conditioner(converted.module, "FrozenCLIPEmbedder", layout), plain)


def test_damaged_positions_are_named():
    """Merges in half precision have left some that are no whole numbers."""
    key = "transformer.embeddings.position_ids"
    assert convert(CLIP, tensors_of(CLIP) | {key: torch.arange(77.0)[None]}).plan.notes[:-1] == ()
    damaged = tensors_of(CLIP) | {key: torch.arange(77.0)[None] * 0.99}
    assert "position_ids do not count from 0" in convert(CLIP, damaged).plan.notes[0]


def test_an_unknown_activation_is_named():
    assert "activation of the text encoder a/b is not known" in convert(CLIP, version="a/b").plan.notes[-1]
    assert not any("activation" in note for note in convert(CLIP).plan.notes)
    assert not any("activation" in note for note in convert("clip 3").plan.notes)


@pytest.mark.parametrize("table", ["shared", "encoder.embed_tokens"])
def test_one_table_of_tokens_under_either_name(table):
    source = tensors_of(T5)
    other = (
        {"transformer.shared.weight", "transformer.encoder.embed_tokens.weight"} - {f"transformer.{table}.weight"}
    ).pop()
    del source[other]
    converted = convert(T5, source)
    assert converted.module.shared.weight is converted.module.encoder.embed_tokens.weight, "trained as one"
    assert_same(export_conditioner(converted.module, "FrozenT5Embedder", converted.plan.layout), source)


def test_halves_are_read_exactly():
    halves = {key: tensor.half() for key, tensor in tensors_of(OPEN_CLIP).items()}
    module = convert(OPEN_CLIP, halves).module
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float32}
    full = convert(OPEN_CLIP, {key: tensor.float() for key, tensor in halves.items()}).module
    assert all(torch.equal(tensor, full.state_dict()[key]) for key, tensor in module.state_dict().items())


def test_layers_of_open_clip():
    """``last`` computes every block, ``penultimate`` all but one; the other tensors are left out."""
    assert convert(OPEN_CLIP, layer="last").module.config.num_hidden_layers == 3
    converted = convert(OPEN_CLIP)
    assert converted.module.config.num_hidden_layers == 2
    assert converted.module.config.hidden_act == "gelu"
    assert convert("open_clip 3").module.config.hidden_act == "quick_gelu"
    assert convert(OPEN_CLIP, version="openai").module.config.hidden_act == "quick_gelu"
    reasons = set(converted.plan.left_out.values())
    assert sorted(key for key in converted.plan.left_out if "resblocks" not in key) == [
        "model.logit_scale",
        "model.text_projection",
    ]
    assert all("resblocks.2." in key for key in converted.plan.left_out if "resblocks" in key)
    assert len(reasons) == 2


def test_the_rest_of_open_clip_comes_from_another_checkpoint():
    source = tensors_of(OPEN_CLIP)
    converted = convert(OPEN_CLIP)
    with pytest.raises(ValueError, match=r"14 tensors that its conditioning does not use .* \(--base\)\.$"):
        export_conditioner(converted.module, "FrozenOpenCLIPEmbedder", converted.plan.layout)
    with pytest.raises(ValueError, match=r"model.logit_scale, model.text_projection.* \(--base\)\.$"):
        export_conditioner(converted.module, "FrozenOpenCLIPEmbedder")
    assert_same(export_conditioner(converted.module, "FrozenOpenCLIPEmbedder", None, source), source)


DAMAGES = {
    "a missing tensor": (lambda t: t.pop(last(t)), r"missing: .*\S"),
    "no table of tokens": (lambda t: [t.pop(key) for key in tables(t)], "lacks .* of the conditioning stage|missing"),
    "a tensor too many": (lambda t: t.update({"transformer.x.weight": torch.ones(1)}), "unexpected: .*x.weight"),
    "another shape": (lambda t: t.update({last(t): torch.ones(3, 7)}), "shape"),
    "a scalar": (lambda t: t.update({middle(t): torch.ones(())}), "shape"),
    "a scalar for the table": (lambda t: t.update({key: torch.ones(()) for key in tables(t)}), "shape"),
    "NaN": (lambda t: t[last(t)].view(-1)[:1].fill_(float("nan")), "NaN or infinity"),
    "integers": (lambda t: t.update({last(t): t[last(t)].long()}), "not floating-point"),
    "complex numbers": (lambda t: t.update({last(t): t[last(t)].to(torch.complex64)}), "not floating-point"),
}  # fmt: skip


def last(tensors: dict[str, Tensor]) -> str:
    return max(key for key in tensors if "norm" in key or "ln_final" in key)


def middle(tensors: dict[str, Tensor]) -> str:
    return next(
        key for key in tensors if "in_proj_weight" in key or "fc1.weight" in key or "to_q" in key or ".q." in key
    )


def tables(tensors: dict[str, Tensor]) -> list[str]:
    return [key for key in tensors if "token" in key or "shared" in key]


@pytest.mark.parametrize("name", [CLIP, "open_clip 2", BERT, T5])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_stages_are_refused_in_one_line(name, damage):
    change, message = DAMAGES[damage]
    tensors = {key: tensor.clone() for key, tensor in tensors_of(name).items()}
    change(tensors)
    with pytest.raises(ValueError, match=message) as raised:
        convert(name, tensors)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (CLIP, {"transformer.text_model.encoder.layers.99999.layer_norm1.weight": torch.ones(64)}, "layers"),
        (CLIP, {"transformer.text_model.encoder.layers.x.weight": torch.ones(64)}, "unexpected"),
        (BERT, {"transformer.x\n\x1b[2J": torch.ones(64)}, r"unexpected: transformer\.x \?\[2J\.$"),
        (OPEN_CLIP, {"model.transformer.resblocks.7.ln_1.weight": torch.ones(64)}, "missing"),
        (T5, {"transformer.encoder.embed_tokens.weight": torch.zeros(40, 32)}, "differ"),
        (BERT, {"transformer.attn_layers.layers.9.0.weight": torch.ones(32)}, "unexpected"),
    ],
)  # fmt: skip
def test_keys_that_do_not_belong_there(name, change, message):
    with pytest.raises(ValueError, match=message):
        convert(name, tensors_of(name) | change)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        (CLIP, {"layr": "last"}, "cond_stage_config.params.layr last is not supported: did you mean layer"),
        (CLIP, {"layer": "penultimate"}, "layer takes one of last, pooled, hidden"),
        (CLIP, {"layer": 3}, "layer takes"),
        (CLIP, {"max_length": 0}, "max_length takes a whole number from 1"),
        (CLIP, {"max_length": 10**30}, "max_length takes a whole number from 1"),
        (T5, {"max_length": 10**9}, "max_length takes a whole number from 1"),
        (BERT, {"max_seq_len": 10**30}, "max_seq_len takes"),
        (CLIP, {"max_length": 78}, "78 is more than the 77 positions"),
        (CLIP, {"version": 7}, "version takes text"),
        (OPEN_CLIP, {"layer": "pooled"}, "layer takes one of last, penultimate"),
        (OPEN_CLIP, {"arch": None}, "arch takes text"),
        (BERT, {"n_embed": None}, "n_embed takes"),
        (BERT, {"n_layer": 3}, "missing"),
        (BERT, {"n_layer": 1}, "unexpected"),
        (BERT, {"vocab_size": 98}, "shape"),
        (BERT, {"max_seq_len": 12}, "shape"),
        (BERT, {"n_embed": 10**9}, "n_embed takes"),
        (T5, {"max_length": "77"}, "max_length takes"),
    ],
)
def test_arguments_that_are_not_those_of_the_file(name, params, message):
    with pytest.raises(ValueError, match=message) as raised:
        convert(name, **params)
    assert "\n" not in str(raised.value)


def test_missing_arguments():
    with pytest.raises(ValueError, match=r"lacks n_embed, n_layer:"):
        read_conditioner({"target": "ldm.modules.encoders.modules.BERTEmbedder"}, "cond_stage_config")
    section = {"target": "a.TransformerEmbedder", "params": {"n_embed": 8, "n_layer": 1}}
    with pytest.raises(ValueError, match=r"lacks vocab_size:"):
        read_conditioner(section, "cond_stage_config")
    assert read_conditioner({"target": "ldm.modules.encoders.modules.FrozenCLIPTextEmbedder"}, "x") is None


def test_every_argument_has_a_row():
    config = config_of(CLIP, device="cuda", layer_idx=None, freeze=False)
    fates = {row.key.rpartition(".")[2]: row.fate for row in config.rows}
    assert fates == {"device": "without effect", "layer_idx": "translated", "freeze": "translated"}
    assert "layer hidden" in config_of(CLIP, layer="hidden", layer_idx=11).reason_to_leave_out
    assert "layer pooled" in config_of(CLIP, layer="pooled").reason_to_leave_out


class TestHeads:
    """No tensor tells the number of heads, nor the activation."""

    def heads(self, heads: int | None = None, width: int = 128, **params: Any) -> Any:
        shapes = {key: [4 * width if side == 512 else width if side == 128 else side for side in shape]
                  for key, shape in RECORDED["clip 3"]["shapes"].items()}  # fmt: skip
        tensors = {key: seeded_tensor(key, tuple(shape)) for key, shape in shapes.items()}
        config = read_conditioner({"target": "a.FrozenCLIPEmbedder", "params": params}, "cond_stage_config")
        assert config is not None
        config = ConditionerConfig(config.kind, config.section, {**config.params, "text_heads": heads})
        converted = convert_conditioner(tensors, config)
        return converted.module.config.num_attention_heads, converted.plan.notes

    def test_64_channels_per_head(self):
        assert self.heads(width=512) == (8, ())
        heads, notes = self.heads(width=128)
        assert heads == 2
        assert "2 is assumed; give another with text_heads (--text_heads)" in notes[0]
        assert self.heads(width=40)[0] == 1

    def test_the_caller_decides(self):
        assert self.heads(4) == (4, ())
        for heads in (3, 0, -1):
            with pytest.raises(ValueError, match="do not divide the width 128"):
                self.heads(heads)
        with pytest.raises(ValueError, match=r"width 96 is not known: give it with text_heads \(--text_heads\)"):
            self.heads(width=96)
        assert self.heads(4, width=96)[0] == 4

    def test_a_folder_as_version(self, tmp_path):
        save_encoder(convert("clip 3").module, tmp_path / "encoder")
        assert self.heads(version=str(tmp_path / "encoder")) == (8, ())
        with pytest.raises(ValueError, match="names an encoder of width 128, but the checkpoint's has 64"):
            self.heads(version=str(tmp_path / "encoder"), width=64)
        for text in ("{", "[]", '{"hidden_act": 3}', '{"hidden_size": 128, "num_attention_heads": "x"}',
                     '{"layer_norm_eps": -1}', '{"text_config": 7}'):  # fmt: skip
            (tmp_path / "encoder" / "config.json").write_text(text)
            with pytest.raises(ValueError, match=r"config\.json"):
                self.heads(version=str(tmp_path / "encoder"))
