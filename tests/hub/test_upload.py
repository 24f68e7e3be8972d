"""Push and load by Hub id, with the real client, against a Hub on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request

import huggingface_hub
import pytest
from helpers.hub_server import LoopbackHub, Repo
from helpers.paths import PYTHONPATH, TESTS
from huggingface_hub import HfApi

from diffusers_ddpm_ext.hub.upload import differing_files


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Facts of the client's process, and the Hub after it."""
    root = tmp_path_factory.mktemp("hub")
    with LoopbackHub() as hub:
        environment = {**os.environ, **hub.environment(str(root / "home")), "PYTHONPATH": PYTHONPATH}
        command = [sys.executable, str(TESTS / "helpers" / "hub_client.py"), str(root)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert ran.returncode == 0, ran.stderr[-4000:]
        yield json.loads((root / "facts.json").read_text()), hub


@pytest.fixture(scope="module")
def facts(session):
    return session[0]


def test_save_and_push_in_one_call(session):
    """Logvar and model index of the pushed commit are those of the saved folder: one commit holds all."""
    _, hub = session
    commits = hub.repos["alice/saved"].commits
    assert [commit.message for commit in commits] == ["initial commit", "one", "two"]
    index = json.loads(hub.files("alice/saved", commits[1].sha)["model_index.json"])
    assert index["_class_name"] == "DDPMPipeline"
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert "logvar/diffusion_pytorch_model.safetensors" in commits[1].files
    assert "README.md" in commits[1].files


def test_revisions(facts):
    """Branch, tag and commit: the table comes from the same commit as the weights."""
    assert facts["revisions"] == [1.0, 1.0, 2.0]
    assert facts["default"] == 2.0
    assert facts["name_or_path"] == "alice/saved"


def test_special_networks_and_tables(facts):
    """By its id, ours opens what stock Diffusers refuses."""
    assert facts["special"] == ["UNet2DExtModel", True, "adm", 3]
    assert "ValueError" in facts["special_stock"]
    assert facts["tokens"]


def test_repository_named_after_the_folder(facts):
    assert facts["default_name"] == 1.5


def test_variant(facts):
    assert facts["variant"] == [True, 3.0]
    assert facts["variant_stock"]


def test_cache(facts):
    assert facts["cache_dir"] == 2.0
    assert "logvar/config.json" in facts["downloaded"]
    assert "logvar/diffusion_pytorch_model.safetensors" in facts["downloaded"]


def test_offline(facts):
    """From the cache, with the table; and where stock cached the rest without it, without one, but not silently."""
    if facts["stock_offline"] != "fine":
        pytest.skip("this diffusers opens no cached repository offline with this huggingface_hub")
    assert facts["local_files_only"] == 2.0
    value, messages = facts["unseen_logvar"]
    assert value is None
    assert "pipeline.logvar will be None" in messages[0]


def test_stock_repository(session, facts):
    assert facts["stock"] == [None, None]
    assert facts["stock_scheduler"] == "DDPMExtScheduler"
    asked = [call for call in session[1].calls if "alice/stock" in call and "logvar" in call]
    assert len(asked) == 1, "the absence of a table is cached"


def test_older_table_leaves_the_repository(session, facts):
    """In the same commit that brings a model without one."""
    assert facts["retrained"] is None
    commits = session[1].repos["alice/retrained"].commits
    assert [any(name.startswith("logvar/") for name in commit.files) for commit in commits] == [False, True, False]


def test_private_repositories(facts):
    assert facts["private"] == 4.0
    assert "OSError" in facts["private_no_token"]
    assert "OSError" in facts["missing"]
    assert "HfHubHTTPError" in facts["read_token"]


def test_the_hub_speaks_as_the_real_one(session):
    """Large files are redirected to another host, which never sees a token; a wrong call is an error, not a page."""
    _, hub = session
    assert any(call.startswith("GET /cdn/") for call in hub.calls)
    assert any(call.startswith("PUT /lfs/") for call in hub.calls)
    with pytest.raises(urllib.error.HTTPError, match="404") as error:
        urllib.request.urlopen(f"{hub.url}/api/nothing", timeout=5)
    error.value.close()
    oid = next(iter(hub.blobs))
    leaking = urllib.request.Request(f"{hub.cdn}/cdn/{oid}", headers={"Authorization": "Bearer hf_writer"})
    with pytest.raises(urllib.error.HTTPError, match="400") as error:
        urllib.request.urlopen(leaking, timeout=5)
    error.value.close()


UPLOADED = {"unet/weights.safetensors": b"weights" * 1000, "config.yaml": b"seed: 1\n", "empty.txt": b""}


@pytest.mark.parametrize("name", [None, *UPLOADED])
@pytest.mark.parametrize("change", [lambda content: b"x" + content[1:], lambda content: content + b"x", None])
def test_differences_between_a_folder_and_a_commit(name, change, tmp_path, monkeypatch):
    """A changed, longer or missing file on the Hub is named; files that only the Hub has are allowed."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # the server is on the loopback
    for path, content in UPLOADED.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    commit_files = {".gitattributes": b"", **UPLOADED}
    if name is not None:
        commit_files[name] = b"" if change is None else change(UPLOADED[name])
        if change is None:
            del commit_files[name]
    with LoopbackHub() as hub:
        hub.repos["alice/digits"] = Repo("alice/digits")
        files = {path: hub.store(content) for path, content in commit_files.items()}
        commit = hub.repos["alice/digits"].add(files, "planted")
        api = HfApi(endpoint=hub.url, token="hf_writer")
        assert differing_files(api, "alice/digits", commit.sha, tmp_path) == ([] if name is None else [name])
