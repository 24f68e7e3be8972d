"""Networks under wrappers: their class, their tensors' names, and the folder that is saved of them."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from diffusers import DDPMPipeline, UNet2DModel
from helpers.tiny import tiny_unet
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, UNet2DExtModel
from diffusers_ddpm_ext.pipelines.stock_layout import plain_network
from diffusers_ddpm_ext.utils.wrappers import network_class, plain_state_dict, unwrap

# torch.compile imports parts of PyTorch that use its own deprecated functions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """A group of this process alone, which DDP needs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def regional(network: UNet2DModel) -> UNet2DModel:
    """Submodules compiled one by one, as Accelerate's ``compile_regions`` does."""
    network.mid_block = torch.compile(network.mid_block)
    network.down_blocks[0] = torch.compile(network.down_blocks[0])
    return network


def in_place(network: UNet2DModel) -> UNet2DModel:
    network.compile()
    return network


def sharded(network: UNet2DModel) -> nn.Module:
    return fully_shard(network, mesh=init_device_mesh("cpu", (1,)))


OURS = "diffusers_ddpm_ext.DDPMExtPipeline"
WRAPPERS = {
    "compile": torch.compile,
    "in_place": in_place,
    "ddp": DistributedDataParallel,
    "data_parallel": nn.DataParallel,
    "compiled_ddp": lambda network: torch.compile(DistributedDataParallel(network)),
    "ddp_of_compiled": lambda network: DistributedDataParallel(torch.compile(network)),
    "regional": regional,
    "averaged": AveragedModel,
    "fsdp2": sharded,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_class_and_names_are_those_of_the_network(wrap):
    network = tiny_unet(1)
    names = list(network.state_dict())
    wrapped = wrap(network)
    assert network_class(wrapped) is UNet2DModel
    assert list(plain_state_dict(wrapped)) == names


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_saved_folder_is_that_of_the_network(tmp_path, wrap, when):
    """Byte for byte, open to stock Diffusers, whether it was wrapped before or after the pipeline was made."""
    DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler()).save_pretrained(tmp_path / "plain")
    pipeline = DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler())
    if when == "before":
        pipeline = DDPMExtPipeline(wrap(tiny_unet(1)), DDPMExtScheduler())
    else:
        pipeline.unet = wrap(pipeline.unet)
    pipeline.save_pretrained(tmp_path / "wrapped")
    for path in (tmp_path / "plain").rglob("*"):
        if path.is_file():
            assert (tmp_path / "wrapped" / path.relative_to(tmp_path / "plain")).read_bytes() == path.read_bytes()
    assert isinstance(DDPMPipeline.from_pretrained(tmp_path / "wrapped").unet, UNet2DModel)


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "fsdp2"])
@pytest.mark.parametrize("guard", ["concat", "coordinates", "learned"])
def test_a_wrapped_network_keeps_the_guard_against_stock(tmp_path, name, guard):
    """With inputs or outputs that stock would pass wrongly, the saved class is the one that it refuses."""
    channels = {"concat": (2, 1), "coordinates": (3, 1), "learned": (1, 2)}[guard]
    scheduler = DDPMExtScheduler(variance_type="learned" if guard == "learned" else "fixed_small")
    settings = {"concat": {"conditioning_key": "concat"}, "coordinates": {"use_positional_encodings": True}}
    pipeline = DDPMExtPipeline(WRAPPERS[name](tiny_unet(*channels)), scheduler, **settings.get(guard, {}))
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["_class_name"], index["unet"]) == (OURS, ["diffusers", "UNet2DExtModel"])
    with pytest.raises(ValueError, match="Ext"):
        UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    assert type(DDPMExtPipeline.from_pretrained(tmp_path).unet) is UNet2DExtModel


def test_a_stock_network_assigned_later_is_guarded_when_it_is_saved(tmp_path):
    pipeline = DDPMExtPipeline(tiny_unet(2, 1), DDPMExtScheduler(), conditioning_key="concat")
    pipeline.unet = tiny_unet(2, 1)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Ext"):
        UNet2DModel.from_pretrained(tmp_path, subfolder="unet")


def test_a_plain_network_is_not_copied():
    network = tiny_unet(1)
    assert unwrap(network) is network
    assert plain_network(network, guarded=False) is network
    tensors = plain_network(regional(tiny_unet(1)), guarded=False).state_dict()
    assert set(tensors) == set(network.state_dict())
