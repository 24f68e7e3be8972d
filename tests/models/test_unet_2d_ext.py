"""The special network: the same function as a stock one where both can say it, and no stock door opens it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from helpers.conversion_cases import random_weights

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, UNet2DExtModel

CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    "norm_num_groups": 8,
}
X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])


def out(network, t=T, **named):
    with torch.no_grad():
        return network.eval()(X, t, **named).sample


def test_a_number_of_heads_is_their_size_where_one_width_attends():
    """Only the middle block attends, at width 64: four heads are heads of 16 channels."""
    plain = CONFIG | {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    stock = random_weights(UNet2DModel(**plain, attention_head_dim=16))
    ours = UNet2DExtModel(**plain, num_attention_heads=4)
    ours.load_state_dict(stock.state_dict())
    assert torch.equal(out(ours), out(stock))
    with pytest.raises(ValueError, match="num_attention_heads is 3"):
        UNet2DExtModel(**plain, num_attention_heads=3)


def test_heads_of_the_way_up_are_their_own():
    base = random_weights(UNet2DExtModel(**CONFIG, num_attention_heads=4))
    other = UNet2DExtModel(**CONFIG, num_attention_heads=4, num_attention_heads_up=2)
    other.load_state_dict(base.state_dict())
    blocks = (other.down_blocks[0], other.mid_block, other.up_blocks[1])
    assert [block.attentions[0].heads for block in blocks] == [4, 4, 2]
    assert float((out(base) - out(other)).abs().max()) > 3e-6


@pytest.mark.parametrize("t", [T, torch.tensor(700), 700])
def test_time_is_scaled(t):
    stock = random_weights(UNet2DModel(**CONFIG, attention_head_dim=None))
    ours = UNet2DExtModel(**CONFIG, attention_head_dim=None, timestep_scale=0.25)
    ours.load_state_dict(stock.state_dict())
    assert torch.equal(out(ours, t), out(stock, torch.as_tensor(t) * 0.25))
    assert float((out(ours, t) - out(stock, t)).abs().max()) > 1e-3


def test_labels_through_a_projection():
    """A linear layer of the label is what is added to the time embedding."""
    ours = random_weights(
        UNet2DExtModel(**CONFIG, class_embed_type="simple_projection", projection_class_embeddings_input_dim=1)
    )
    stock = UNet2DModel(**CONFIG, class_embed_type="identity")
    stock.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("class_embedding")})
    labels = torch.tensor([[0.3], [-2.0]])
    with torch.no_grad():
        embedded = labels @ ours.class_embedding.weight.T + ours.class_embedding.bias
    assert torch.allclose(out(ours, class_labels=labels), out(stock, class_labels=embedded), atol=1e-6)
    with pytest.raises(ValueError, match="projection_class_embeddings_input_dim"):
        UNet2DExtModel(**CONFIG, class_embed_type="projection")


def test_the_same_network_shares_its_tensors():
    stock = random_weights(UNet2DModel(**CONFIG)).train()
    stock.conv_in.weight.requires_grad_(False)
    ours = UNet2DExtModel.from_unet(stock)
    assert ours.conv_in.weight.data_ptr() == stock.conv_in.weight.data_ptr()
    assert ours.training
    assert not ours.conv_in.weight.requires_grad
    assert ours.conv_out.weight.requires_grad
    assert torch.equal(out(ours), out(stock))
    assert UNet2DExtModel.from_unet(ours) is ours


def test_doors(tmp_path):
    """Ours opens the folder to the bit; every stock door refuses it, with this package imported, too."""
    network = random_weights(UNet2DExtModel(**CONFIG, num_attention_heads=4, timestep_scale=0.5))
    DDPMExtPipeline(network, DDPMExtScheduler(num_train_timesteps=20)).save_pretrained(tmp_path)
    again = DDPMExtPipeline.from_pretrained(tmp_path)
    assert type(again.unet) is UNet2DExtModel
    assert torch.equal(out(again.unet), out(network))
    assert again.unet.config.num_attention_heads == 4
    for door in (
        lambda: UNet2DModel.from_pretrained(tmp_path / "unet"),
        lambda: UNet2DModel.from_pretrained(tmp_path, subfolder="unet"),
        lambda: UNet2DModel.from_config(again.unet.config),
    ):
        with pytest.raises(ValueError, match="ExtAttnDownBlock2D"):
            door()
    index = (tmp_path / "model_index.json").read_text()
    assert '"diffusers",\n    "UNet2DExtModel"' in index
    assert '"_class_name": "diffusers_ddpm_ext.DDPMExtPipeline"' in index


DOORS = """
    import sys
    from diffusers import AutoModel, DDPMPipeline, DiffusionPipeline, UNet2DModel
    for folder in sys.argv[1:]:
        for door in (
            lambda: DDPMPipeline.from_pretrained(folder),
            lambda: DiffusionPipeline.from_pretrained(folder),
            lambda: AutoModel.from_pretrained(folder, subfolder="unet"),
            lambda: UNet2DModel.from_pretrained(folder + "/unet"),
        ):
            try:
                door()
            except Exception as error:
                print("refused", type(error).__name__)
    assert "diffusers_ddpm_ext" not in sys.modules
    """


def test_doors_without_this_package(tmp_path):
    """Both kinds: another function of its weights, and grey images with one channel joined to them.

    Of the second one, stock DDPMPipeline would draw two channels, without an error.
    """
    network = UNet2DExtModel(**CONFIG, num_attention_heads=4)
    DDPMExtPipeline(network, DDPMExtScheduler(num_train_timesteps=20)).save_pretrained(tmp_path / "heads")
    grey = UNet2DModel(**CONFIG | {"in_channels": 2, "out_channels": 1})
    DDPMExtPipeline(grey, DDPMExtScheduler(num_train_timesteps=20), "concat").save_pretrained(tmp_path / "concat")
    command = [sys.executable, "-c", textwrap.dedent(DOORS), str(tmp_path / "heads"), str(tmp_path / "concat")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("refused") == 8
