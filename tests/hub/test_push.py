"""`ddpm-ext push` and `ddpm-ext verify` with the real client, against a loopback Hub that fails in every way."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.hub_server import Fault, LoopbackHub
from helpers.paths import TESTS
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.hub.card import make_card
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat

TOKEN = "hf_secretsecretsecret"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a run leaves: a pipeline with two sets of weights, numbers, and what does not belong on the Hub."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    pipeline = DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(20, beta_end=0.4))
    pipeline.save_pretrained(folder)
    raw = tiny_unet(1)
    with torch.no_grad():
        raw.conv_out.weight.add_(0.05)
    raw.save_pretrained(folder / "unet", variant="raw")
    (folder / "config.yaml").write_text("data:\n  dataset_name: null\n")
    (folder / "metrics.jsonl").write_text('{"step": 7, "val/loss_simple_ema": 0.25}\n')
    (folder / ".run.lock").write_text("1 here")
    (folder / "logs").mkdir()
    (folder / "logs" / "events").write_text("tracker")
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "digits"))


@pytest.fixture
def hub():
    with LoopbackHub({TOKEN: "write", "hf_readerreader": "read"}) as server:
        yield server


@pytest.fixture
def call(hub, tmp_path):
    """A command in a process of its own, as a user types it."""

    def run(*argv: str, token: str | None = TOKEN, timeout: float = 120, **more: str) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        environment |= hub.environment(str(tmp_path / "home"), token) | {"PYTHONPATH": str(TESTS.parent)} | more
        command = [sys.executable, "-m", "diffusers_ddpm_ext", *argv]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert TOKEN not in done.stdout + done.stderr
        return done

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_push_and_verify(call, hub, folder, tmp_path):
    """All that belongs there, in one commit, with a card and a proof; what does not belong there stays here."""
    before = contents(folder)
    done = call("push", str(folder), "--license", "mit")
    assert done.returncode == 0, done.stderr
    assert "alice/digits" in done.stdout
    assert "ddpm-ext verify alice/digits" in done.stdout
    files = hub.files("alice/digits")
    assert {"unet/diffusion_pytorch_model.raw.safetensors", "README.md", "proof.json", "card/samples.png"} <= set(
        files
    )
    assert not [name for name in files if name.startswith((".", "logs"))]
    for name, content in before.items():
        assert (folder / name).read_bytes() == content
        assert name not in files or files[name] == content
    assert len(hub.repos["alice/digits"].commits) == 2

    again = call("push", str(folder), "--license", "mit")
    assert again.returncode == 0, again.stderr
    assert len(hub.repos["alice/digits"].commits) == 2, "nothing was left to be done"

    fine = call("verify", "alice/digits", "--folder", str(folder))
    assert fine.returncode == 0, fine.stderr
    assert "agree in 100.00%" in fine.stdout


def blocks_of(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", card, re.M | re.S)


def test_every_snippet_of_a_card_runs(call, hub, folder, tmp_path):
    """In a new process with an empty cache; the stock ones in one that cannot import this package."""
    DDPMExtPipeline(tiny_unet(1, 2), DDPMExtScheduler(20, variance_type="learned")).save_pretrained(tmp_path / "ours")
    assert call("push", str(folder), "--no_images").returncode == 0
    assert call("push", str(tmp_path / "ours"), "--no_images").returncode == 0
    plain, ours = (hub.files(f"alice/{name}")["README.md"].decode() for name in ("digits", "ours"))
    assert "Stock Diffusers cannot sample this model" in ours
    blocks = blocks_of(plain) + blocks_of(ours)
    assert len(blocks) == 5
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    environment |= hub.environment(str(tmp_path / "new-home"), None) | {"PYTHONPATH": str(TESTS.parent)}
    shutil.rmtree(folder)
    for block in blocks:
        stock = "" if "diffusers_ddpm_ext" in block else "import sys\nsys.modules['diffusers_ddpm_ext'] = None\n"
        code = block.replace("_steps=50", "_steps=10").replace("_steps=20", "_steps=10")  # the chain has 20
        done = subprocess.run(
            [sys.executable, "-c", f"{stock}{code}\nassert len(images) == 4\n"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_metadata_of_a_card(trained, made):
    """As the client's own classes read it."""
    from huggingface_hub import ModelCard

    text = (made / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "unconditional-image-generation")
    (made / "evaluation").mkdir()
    facts = {"bits_per_dim": 3.1, "low": 3.0, "high": 3.2, "num_images": 180, "split": "validation"}
    facts |= {"chain": 10, "chain_timesteps": [20, 999], "bin_width": 0.125, "decoder_kind": "exact"}
    (made / "evaluation" / "evaluation.json").write_text(json.dumps(facts))
    text = make_card(made, "alice/digits", "mit")
    shutil.rmtree(made / "evaluation")
    card = ModelCard(text)
    assert card.data.license == "mit"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("bits_per_dim", 3.1)
    assert result.metric_name == "bits per dimension (chain of 10 steps down to t = 20, bins of 0.125)"
    assert f"| {result.metric_name}, 180 images | 3.1000" in card.text
    assert "95% interval 3.0000 to 3.2000" in card.text
    assert "| validation loss, averaged weights | 0.2500 |" in card.text
    for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (made / name).is_file(), name


FAULTS = {
    "create 500": Fault("POST /api/repos/create", 500),
    "create 503": Fault("POST /api/repos/create", 503),
    "create dropped": Fault("POST /api/repos/create", "drop"),
    "create 403": Fault("POST /api/repos/create", 403),
    "preupload 500": Fault("POST .*/preupload/", 500),
    "preupload dropped": Fault("POST .*/preupload/", "drop"),
    "batch 500": Fault("POST .*/objects/batch", 500),
    "large file 500": Fault("PUT /lfs/", 500),
    "large file dropped": Fault("PUT /lfs/", "drop"),
    "commit 500": Fault("POST .*/commit/", 500),
    "commit dropped": Fault("POST .*/commit/", "drop"),
    "commit 409": Fault("POST .*/commit/", 409),
    "commit 403": Fault("POST .*/commit/", 403),
    "quota": Fault("POST .*/commit/", 403, message="Private repository storage limit reached"),
    "tree 500": Fault("GET .*/tree/", 500),
    "silent at create": Fault("POST /api/repos/create", "stall"),
    "silent at commit": Fault("POST .*/commit/", "stall"),
}


QUICK = ("create 500", "commit dropped", "quota", "silent at commit")  # the others take their time, or are alike
CASES = [
    pytest.param(fault, id=name, marks=[] if name in QUICK else [pytest.mark.slow]) for name, fault in FAULTS.items()
]


@pytest.mark.parametrize("fault", CASES)
def test_a_fault_loses_nothing_and_names_the_line_that_finishes(call, hub, folder, fault, tmp_path):
    before = contents(folder)
    hub.faults.append(Fault(fault.call, fault.what, message=fault.message))
    done = call("push", str(folder), "--no_images", "--timeout", "1")
    assert done.returncode == 1, done.stdout
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "Traceback" not in done.stderr
    if fault.message != "a fault":
        assert fault.message in told[0]
    assert contents(folder) == before
    line = re.search(r"to finish: ddpm-ext (push .*)$", told[0])
    assert line is not None, told[0]
    hub.faults.clear()
    finished = call(*line[1].split(), "--no_images")
    assert finished.returncode == 0, finished.stderr
    assert hub.files("alice/digits")["proof.json"] == (folder / "proof.json").read_bytes()


@pytest.mark.parametrize(
    "fault",
    [
        "commit 500",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("create 500", "large file 500", "commit dropped", "commit 409")
        ),
    ],
)
def test_a_fault_that_passes_is_survived(call, hub, folder, fault):
    hub.faults.append(Fault(FAULTS[fault].call, FAULTS[fault].what, times=1))
    done = call("push", str(folder), "--no_images")
    assert done.returncode == 0, done.stderr
    assert len(hub.repos["alice/digits"].commits) == 2


@pytest.mark.parametrize(
    ("token", "told"),
    [(None, "401"), ("hf_nobodynobody", "401"), ("hf_readerreader", "403")],
    ids=["no token", "unknown token", "token that only reads"],
)
def test_tokens_that_may_not(call, folder, token, told):
    done = call("push", str(folder), "--no_images", token=token)
    assert done.returncode == 1
    assert told in done.stderr
    assert "to finish: ddpm-ext push" in done.stderr
    assert token is None or token not in done.stderr


def test_no_network(call, folder):
    done = call("push", str(folder), "--no_images", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "was not reached" in done.stderr
    assert "to finish: ddpm-ext push" in done.stderr


def test_a_hub_without_xet(call, hub, folder):
    """The client asks for Xet where its package is installed, and this Hub has none."""
    done = call("push", str(folder), "--no_images", HF_HUB_DISABLE_XET="0")
    assert done.returncode == 0, done.stderr
    assert "unet/diffusion_pytorch_model.safetensors" in hub.files("alice/digits")


def test_the_token_of_the_command_line_goes_nowhere(call, hub, folder, tmp_path):
    push = ("push", str(folder), "--no_images", "--hub_token", TOKEN)
    assert call(*push, token=None).returncode == 0
    hub.faults.append(Fault("POST .*/commit/", 500, message=f"no room for {TOKEN}"))
    (folder / "metrics.jsonl").write_text('{"step": 8}\n')
    assert call(*push, token=None).returncode == 1
    found = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert found == []
    assert not [name for name, content in hub.files("alice/digits").items() if TOKEN.encode() in content]


def test_a_readme_of_ones_own_is_kept(call, hub, folder):
    (folder / "README.md").write_text("mine")
    assert call("push", str(folder), "--no_images").returncode == 0
    assert hub.files("alice/digits")["README.md"] == b"mine"


def test_what_the_folder_has_no_more_goes(call, hub, folder):
    assert call("push", str(folder), "--no_images").returncode == 0
    (folder / "unet" / "diffusion_pytorch_model.raw.safetensors").unlink()
    assert call("push", str(folder), "--no_images").returncode == 0
    assert "unet/diffusion_pytorch_model.raw.safetensors" not in hub.files("alice/digits")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["missing/folder/too"], "does not exist"),
        (["digits", "--hub_model_id", "a/b/c"], "--hub_model_id 'a/b/c'"),
        (["digits", "--timeout", "0"], "--timeout must be above 0"),
        (["digits", "--with_checkpoint"], "no intact checkpoint"),
    ],
)
def test_bad_input(call, folder, argv, told, hub):
    done = call("push", *argv)
    assert done.returncode == 2
    assert told in done.stderr
    assert hub.calls == []


# ---------------------------------------------------------------------- verify


@pytest.fixture
def pushed(call, hub, folder):
    assert call("push", str(folder), "--no_images").returncode == 0
    return hub.repos["alice/digits"]


def test_a_whole_folder(loaded, capsys):
    assert cli.main(["verify", str(loaded)]) == 0
    assert "agree in 100.00%" in capsys.readouterr().out


def replaced(hub, repo, name, content):
    """The newest commit, with another file, as someone else might have written it."""
    files = dict(repo.commits[-1].files)
    if content is None:
        files.pop(name)
    else:
        files[name] = hub.store(content)
    repo.add(files, "edited")


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def found_wrong(call, told, *flags):
    done = call("verify", "alice/digits", *flags)
    assert done.returncode == 1, done.stdout
    assert told in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


def found_wrong_here(loaded, told, capsys):
    assert cli.main(["verify", str(loaded)]) == 1
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    """What a push brings to the Hub, in a folder."""
    from diffusers_ddpm_ext.hub.push import _add_card_and_proof
    from diffusers_ddpm_ext.hub.upload import copy_snapshot, list_upload_files

    place = tmp_path_factory.mktemp("pushed")
    copy_snapshot(list_upload_files(trained).files, place)
    _add_card_and_proof(place, "alice/digits", None, True)
    return place


@pytest.fixture
def loaded(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "loaded"))


@pytest.mark.parametrize(
    "name", ["unet/diffusion_pytorch_model.safetensors", "README.md", "proof.json", "card/samples.npz", "config.yaml"]
)
def test_one_flipped_byte(loaded, name, capsys):
    content = (loaded / name).read_bytes()
    (loaded / name).write_bytes(flipped(content, len(content) // 2))
    found_wrong_here(loaded, name, capsys)


def test_a_flipped_byte_below_the_commit(call, hub, pushed):
    """The Hub's disk rots: the commit is the same."""
    oid = pushed.commits[-1].files["unet/diffusion_pytorch_model.safetensors"]
    hub.blobs[oid] = flipped(hub.blobs[oid], 1000)
    found_wrong(call, "unet/diffusion_pytorch_model.safetensors was changed")


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.raw.safetensors", "scheduler/scheduler_config.json"])
def test_a_missing_file(loaded, name, capsys):
    (loaded / name).unlink()
    found_wrong_here(loaded, f"{name} is missing", capsys)


def test_swapped_weights(loaded, capsys):
    one = loaded / "unet/diffusion_pytorch_model.safetensors"
    other = loaded / "unet/diffusion_pytorch_model.raw.safetensors"
    was = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(was)
    found_wrong_here(loaded, "the EMA weights and the raw ones are swapped", capsys)


def test_an_edited_scheduler(loaded, capsys):
    path = loaded / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.3}))
    found_wrong_here(loaded, "scheduler/scheduler_config.json has", capsys)


def test_weights_that_do_not_draw_the_card(loaded, capsys):
    """Someone swaps the weights and makes a new proof: the images tell."""
    from diffusers_ddpm_ext.hub.proof import read_proof, write_proof

    drawn = read_proof(loaded)["images"]
    unet = loaded / "unet"
    shutil.copy(unet / "diffusion_pytorch_model.raw.safetensors", unet / "diffusion_pytorch_model.safetensors")
    write_proof(loaded, drawn)
    found_wrong_here(loaded, "of the pixels of the card's images agree", capsys)


def test_an_older_commit(call, hub, pushed, folder):
    """By its name, by the branch that went back, and by the folder that was pushed."""
    (folder / "metrics.jsonl").write_text('{"step": 9}\n')
    assert call("push", str(folder), "--no_images").returncode == 0
    old, new = pushed.commits[-2].sha, pushed.commits[-1].sha
    found_wrong(call, f"newest commit of main is {new[:12]}", "--revision", old)
    pushed.refs["main"] = old
    found_wrong(call, f"the last push from this machine is {new[:12]}")
    found_wrong(call, f"the last push from {folder} is {new[:12]}", "--folder", str(folder))


def test_a_file_that_someone_adds_on_the_hub(call, hub, pushed):
    """Beside .gitattributes, which the Hub itself adds."""
    assert call("verify", "alice/digits").returncode == 0
    replaced(hub, pushed, "unet/diffusion_pytorch_model.safetensors.index.json", b"{}")
    found_wrong(call, "added after the push: unet/diffusion_pytorch_model.safetensors.index.json")


def test_a_repository_without_proof(call, hub, pushed):
    replaced(hub, pushed, "proof.json", None)
    done = call("verify", "alice/digits")
    assert done.returncode == 2
    assert "has no proof.json" in done.stderr


def test_a_repository_that_is_not_there(call):
    done = call("verify", "alice/nothing")
    assert done.returncode == 2
    assert "cannot load alice/nothing" in done.stderr


@pytest.mark.slow
def test_arrays_are_pushed_verified_and_sampled_by_id(call, hub, tmp_path):
    """Five bands of int16: the card shows the chosen ones, all are verified, and samples by id are the data's."""
    pixels = PixelFormat("int16", -100, 4000, ".npy", preview_channels=(4, 2, 0))
    pipeline = DDPMExtPipeline(tiny_unet(5), DDPMExtScheduler(20), pixel_format=pixels)
    pipeline.save_pretrained(tmp_path / "bands")
    done = call("push", str(tmp_path / "bands"))
    assert done.returncode == 0, done.stderr
    card = hub.files("alice/bands")["README.md"].decode()
    assert "8x8x5 images of int16 from -100 to 4000" in card
    assert "The picture shows channels 4, 2, 0 of 5" in card
    assert np.load(io.BytesIO(hub.files("alice/bands")["card/samples.npz"]))["images"].shape == (9, 8, 8, 5)
    done = call("verify", "alice/bands")
    assert done.returncode == 0, done.stderr
    for source, out in (("alice/bands", "hub.npy"), ("bands", "folder.npy")):
        done = call("sample", source, "--out", out, "--num_images", "2", "--device", "cpu")
        assert done.returncode == 0, done.stderr
    drawn = np.load(tmp_path / "hub.npy")
    assert drawn.dtype == np.int16
    assert drawn.min() >= -100
    assert drawn.max() <= 4000
    assert np.array_equal(drawn, np.load(tmp_path / "folder.npy"))
