"""Every code block of the pages is run, or states why not; every flag of train_unconditional.py has its row."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import pydoc
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL, UNet2DModel
from helpers.latent_cases import write_pictures
from helpers.paths import ROOT
from helpers.prompt_cases import text_pipeline, tiny_conditional_unet
from helpers.runs import tiny_run
from helpers.text_models import save_text_model, tiny_tokenizer
from helpers.tiny import tiny_unet
from PIL import Image
from test_public_surface import FROZEN_PATHS, PUBLIC

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.models.spatial_rescaler import SpatialRescaler
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat

PACKAGE = ROOT / "diffusers_ddpm_ext"
PAGES = ["CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]
NOT_RUN = r"\s*<!-- not run here: [^>]{8,} -->"
FLAGS = """
dataset_name dataset_config_name model_config_name_or_path train_data_dir output_dir overwrite_output_dir cache_dir
resolution center_crop random_flip train_batch_size eval_batch_size dataloader_num_workers num_epochs
save_images_epochs save_model_epochs gradient_accumulation_steps learning_rate lr_scheduler lr_warmup_steps adam_beta1
adam_beta2 adam_weight_decay adam_epsilon use_ema ema_inv_gamma ema_power ema_max_decay push_to_hub hub_token
hub_model_id hub_private_repo logger logging_dir local_rank mixed_precision prediction_type ddpm_num_steps
ddpm_num_inference_steps ddpm_beta_schedule checkpointing_steps checkpoints_total_limit resume_from_checkpoint
enable_xformers_memory_efficient_attention preserve_input_precision
"""
SMALLER = {
    "--block_out_channels 192 384 576 896": "--block_out_channels 32 32 32 32",
    "--attention_head_dim 64": "--attention_head_dim 32",
    "--layers_per_block 3": "--layers_per_block 1",
    "--train_batch_size 32": "--train_batch_size 1",
}
"""Sizes of the run in scale.md, whose other options are run as they are."""
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]


def blocks(page: str) -> list[tuple[str, str, bool]]:
    """Language, text, and whether it is run, of each code block."""
    text = (ROOT / page).read_text()
    result = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        result.append((match[1], match[2], re.match(NOT_RUN, text[match.end() :]) is None))
    return result


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with everything that the pages name: a run on the digits, one with classes, photos."""
    root = tmp_path_factory.mktemp("docs")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    sizes = {
        "num_train_timesteps": 1000,
        "ddpm_num_inference_steps": 5,
        "max_train_steps": 2,
        "validation_max_images": None,
    }
    trainer.train(tiny_run(root / "runs" / "digits", **sizes, learn_logvar=True))
    unet = UNet2DModel(**tiny_unet(1).config | {"num_class_embeds": 11})
    classes = DDPMExtPipeline(unet, DDPMExtScheduler(), "adm", null_class_label=10)
    classes.save_pretrained(root / "runs" / "classes")
    mark_as_run(root, "classes")
    (root / "photos").mkdir()
    for index in range(20):
        noise = np.random.default_rng(index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "photos" / f"{index}.png")
    add_latent_models(root)
    add_text_models(root)
    add_other_data(root)
    return root


def mark_as_run(root: Path, name: str) -> None:
    """Give a folder the marks of a run's, which may be overwritten."""
    for file in ("config.yaml", "metrics.jsonl"):
        shutil.copy(root / "runs" / "digits" / file, root / "runs" / name)


def add_latent_models(root: Path) -> None:
    """A first stage, a run in its latents, an inpainting model, and pictures with holes, for latents.md."""
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    sizes = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "latent_channels": 4}
    vae = AutoencoderKL(**levels, **sizes)
    vae.save_pretrained(root / "runs" / "vae")
    data = {"train_data_dir": str(root / "photos"), "resolution": 64, "validation_max_images": None}
    sizes = {"num_train_timesteps": 10, "ddpm_num_inference_steps": 5, "max_train_steps": 1, "validation_steps": 1}
    latents = {"vae": str(root / "runs" / "vae"), "scale_factor": "data"}
    trainer.train(tiny_run(root / "runs" / "latent", **data, **sizes, **latents))
    painting = DDPMExtPipeline(
        tiny_unet(9, 4, 16), DDPMExtScheduler(10, clip_sample=False), "concat", vae=vae, concat_through_vae="mode"
    )
    painting.save_pretrained(root / "runs" / "painted")
    for name in ("vae", "painted"):
        mark_as_run(root, name)
    write_pictures(root / "holes", ["cat.png", "dog.webp"], (64, 64), "RGBA")
    write_pictures(root / "pairs", [f"{index}.png" for index in range(20)], (64, 64))
    write_pictures(root / "pairs" / "holes", [f"{index}.png" for index in range(20)], (64, 64), "RGBA")
    rows = [f"{index}.png,holes/{index}.png" for index in range(20)]
    rows += [f"holes/{index}.png,holes/{index}.png" for index in range(20)]
    (root / "pairs" / "metadata.csv").write_text("\n".join(["file_name,condition", *rows, ""]))


def add_text_models(root: Path) -> None:
    """Models that draw what a prompt says, an encoder, captioned pictures, prompts and maps, for conditioning.md."""
    save_text_model(root / "clip")
    text_pipeline("clip", is_latent=True).save_pretrained(root / "runs" / "text")
    text_pipeline("clip", tokenizer=None).save_pretrained(root / "runs" / "untokenized")
    rescaler = SpatialRescaler(n_stages=1, in_channels=6, out_channels=2)
    arguments = {"unet": tiny_conditional_unet(5, 3), "conditioning_key": "hybrid", "concat_encoder": rescaler}
    text_pipeline("clip", **arguments).save_pretrained(root / "runs" / "maps")
    (root / "prompts.txt").write_text("a red apple\na cat\n")
    np.save(root / "ids.npy", np.array(tiny_tokenizer()(["a cat"], padding="max_length").input_ids))
    write_pictures(root / "emoji", [f"{index}.png" for index in range(20)], (64, 64))
    rows = [f"{index}.png,a {('red', 'blue')[index % 2]} cat" for index in range(20)]
    (root / "emoji" / "metadata.csv").write_text("\n".join(["file_name,text", *rows, ""]))
    (root / "maps").mkdir()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) % 6).save(root / "maps" / "a.png")


def add_other_data(root: Path) -> None:
    """Pictures in folders of classes, and a model of five bands of floats, for data.md and scale.md."""
    names = [f"{('val', 'train')[index > 1]}/n{index % 2:08}/{index}.jpeg" for index in range(8)]
    write_pictures(root / "imagenet", names, (80, 64))
    write_pictures(root / "icons", [f"{('cat', 'dog')[index % 3 > 0]}/{index}.png" for index in range(12)], (40, 32))
    bands = DDPMExtPipeline(tiny_unet(5), DDPMExtScheduler())
    bands.pixel_format = PixelFormat("float32", 0.0, 1.0, ".npy")
    bands.save_pretrained(root / "runs" / "bands")


def run_commands(text: str) -> None:
    for line in text.replace("\\\n", " ").splitlines():
        line = line.replace("accelerate launch training/train.py", "ddpm-ext train")
        arguments = shlex.split(line, comments=True)
        if not arguments:
            continue
        assert arguments[0] == "ddpm-ext", f"{line}: state why it is not run"
        if arguments[1] in ("train", "train-vae"):
            arguments += [] if "--dry_run" in arguments else ["--dry_run"]
            arguments += [] if "--train_batch_size" in arguments else ["--train_batch_size", "2"]  # of its timed steps
        if arguments[1] == "sample" and "--num_inference_steps" not in arguments:
            arguments += ["--num_inference_steps", "4"]
        if arguments[1] in ("train", "train-vae") and "--resume_from_checkpoint" not in arguments:
            arguments.append("--overwrite_output_dir")  # a dry run deletes nothing
        if arguments[1] == "doctor":
            arguments.append("--offline")
        if arguments[1] == "fit-variance":
            arguments += ["--draws", "2", "--max_steps", "10"]
        if arguments[1] == "fit-steps":
            arguments += ["--num_trajectories", "2"]
        if "--metrics" in arguments or "--memorization" in arguments:
            arguments = ["16" if argument == "2000" else argument for argument in arguments]
            arguments += [] if "--num_inference_steps" in arguments else ["--num_inference_steps", "3"]
        elif arguments[1] == "evaluate" and "--optimal_timesteps" not in arguments:
            arguments += ["--max_images", "6"]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        assert cli.main(arguments[1:]) == 0, line


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_or_states_why_not(page, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    names: dict = {"DDPMExtPipeline": DDPMExtPipeline, "torch": torch}
    shared = {f"docs/{name}.md" for name in ("api", "conditioning", "likelihood", "your-own-loop")}
    for language, text, to_run in blocks(page):
        if not to_run:
            continue
        if language == "python":
            text = re.sub(r"num_inference_steps=\d\d+", "num_inference_steps=10", text)
            text = text.replace("STEPS = 500", "STEPS = 5")  # end_to_end/test_your_own_loop.py takes them all
            if page not in shared:
                names = {}
            exec(compile(text, page, "exec"), names)
        elif page == "CONTRIBUTING.md":
            continue  # make targets and pytest: CI runs them
        else:
            assert language == "", f"{page}: a block in {language} is not run"
            if page == "docs/scale.md":
                for size, small in SMALLER.items():
                    assert size in text
                    text = text.replace(size, small)
            run_commands(text)


def test_examples_of_contributing_are_short():
    examples = [text for language, text, _ in blocks("CONTRIBUTING.md") if language == "python"]
    assert len(examples) == 4
    assert all(len(text.splitlines()) <= 20 for text in examples)


def test_every_flag_of_train_unconditional_has_its_row(capsys, tmp_path, monkeypatch):
    """The row is correct, too: the flag is accepted, or refused with an explanation."""
    monkeypatch.chdir(tmp_path)
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", (ROOT / "docs/coming-from-train-unconditional.md").read_text(), re.M)
    described = {flag: text for flags, text in rows for flag in re.findall(r"`--(\w+)`", flags)}
    assert set(described) == set(FLAGS.split())
    assert cli.main(["train", "--help"]) == 0
    help_text = capsys.readouterr().out
    for flag, text in described.items():
        if text.startswith("refused"):
            assert cli.main(["train", f"--{flag}", "1", "--dry_run"]) == 2
            assert flag in capsys.readouterr().err
        else:
            assert f"--{flag}" in help_text, flag


def test_every_public_name_is_on_the_api_page_with_an_example():
    """The name is documented from its module, and a block of code uses it after importing it."""
    page = "docs/api.md"
    trees = [ast.parse(text) for language, text, _ in blocks(page) if language == "python"]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    used = {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.attr for node in nodes if isinstance(node, ast.Attribute)
    }
    imported = {
        (str(node.module), alias.name) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    directives = re.findall(r"^::: (\S+)$", (ROOT / page).read_text(), re.M)
    for module, names in {"": " ".join(PUBLIC - {"__version__"}), **FROZEN_PATHS}.items():
        place = importlib.import_module(f"diffusers_ddpm_ext.{module}".rstrip("."))
        for name in names.split():
            assert (place.__name__, name) in imported, f"{name}: not imported from {place.__name__}"
            assert name in used, f"{name}: no example"
            documented = getattr(place, name)
            path = f"{documented.__module__}.{name}"
            assert {path, documented.__module__} & set(
                directives
            ) or f"diffusers_ddpm_ext.{module}.{name}" in directives, path


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_no_line_of_code_is_cut(page):
    """GitHub shows about 120 characters of a line of code, the site wraps longer lines."""
    for language, text, _ in blocks(page):
        for line in text.splitlines():
            assert len(line) <= 119, f"{page}, {language or 'shell'}: {line}"


def test_the_site_loads_nothing_from_elsewhere():
    """Formulas are drawn by the KaTeX in docs/assets: its files are complete and no page names an outside script."""
    settings = (ROOT / "mkdocs.yml").read_text()
    for files in re.findall(r"^extra_(?:css|javascript): \[(.*)\]$", settings, re.M):
        for name in files.split(", "):
            assert (ROOT / "docs" / name).is_file(), name
    style = (ROOT / "docs/assets/katex/katex.min.css").read_text()
    fonts = set(re.findall(r"url\(([^)]+)\)", style))
    assert fonts
    assert all((ROOT / "docs/assets/katex" / font).is_file() for font in fonts)
    assert "http" not in settings
    assert "font: false" in settings  # otherwise Google's
    for page in PAGES:
        assert "```mermaid" not in (ROOT / page).read_text(), f"{page}: the theme loads mermaid from a CDN"


@pytest.mark.parametrize("page", PAGES)
def test_formulas_are_complete(page):
    """Every formula has its closing dollar on the same line, balanced braces, and no line end that Markdown eats."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`", "", text)
    displayed = re.findall(r"^\$\$\n(.*?)\n\$\$$", text, re.M | re.S)
    text = re.sub(r"^\$\$\n.*?\n\$\$$", "", text, flags=re.M | re.S)
    for line in text.splitlines():
        assert line.count("$") % 2 == 0, line
        displayed += re.findall(r"\$([^$]+)\$", line)
    for formula in displayed:
        assert formula.count("{") == formula.count("}"), formula
        assert formula == formula.strip(), formula
        assert "|" not in formula, formula


@pytest.mark.parametrize(
    "module",
    sorted(
        {
            *FROZEN_PATHS,
            "schedulers.scheduling_ddpm_ext",
            "losses.objective",
            "models.ema",
            "models.unet_2d_ext",
            "diffusion.schedule",
            "diffusion.weighting",
            "diffusion.optimal_variance",
            "pipelines.pipeline_ddpm_ext",
            "utils.lr_lambdas",
            "schedulers.adapter",
        }
    ),
)
def test_args_sections_list_the_parameters_in_order(module):
    """What help() shows below the signature names the same parameters in the same order, and no other."""
    place = importlib.import_module(f"diffusers_ddpm_ext.{module}")
    names = [name for name in dir(place) if not name.startswith("_")]
    for name in names:
        value = getattr(place, name)
        if not getattr(value, "__module__", "").startswith("diffusers_ddpm_ext."):
            continue
        members = [(name, value)]
        if isinstance(value, type):
            members += [(f"{name}.{key}", member) for key, member in vars(value).items() if inspect.isfunction(member)]
        for label, member in members:
            section = re.search(
                r"^\s*Args:\n((?:\s+.*\n|\n)+?)(?=\s*(?:Returns|Raises|Yields|Attributes|Example):|\Z)",
                f"{inspect.getdoc(member) or ''}\n",
                re.M,
            )
            if section is None:
                continue
            documented = re.findall(r"^    (\*{0,2}\w+)[^:\n]*:", section[1], re.M)
            signature = [
                p.name for p in inspect.signature(member).parameters.values() if p.name not in ("self", "cls")
            ]
            plain = [d.lstrip("*") for d in documented]
            assert plain == [p for p in signature if p in plain], label
            assert set(plain) == set(signature), label


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text()
    for path in ROOT.glob("docs/*.md"):
        assert f": {path.name}" in nav, path.name


def test_architecture_page_describes_every_folder():
    page = (ROOT / "docs/architecture.md").read_text()
    folders = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("__init__.py")} - {"."}
    described = re.findall(r"^\| `([\w/]+)/` \|", page, re.M)
    assert set(described) == folders | {"training/recipes"}
    assert len(described) == len(set(described))
    floors = {folder for folder in folders if "/" not in folder}
    assert set(re.findall(r">(\w+)/</text>", (ROOT / "docs/images/floors.svg").read_text())) == floors


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_and_names_that_the_layout_pages_mention_exist(page):
    """Paths are relative to the package; names in parentheses after a path are defined in that file."""
    text = (ROOT / page).read_text()
    paths = set(re.findall(r"`([\w/]+\.py)`", text))
    assert len(paths) > 10
    for path in paths:
        assert (PACKAGE / path).is_file() or (ROOT / path).is_file(), path
    for path, names in re.findall(r"`([\w/]+\.py)` \(((?:`\w+`(?:, )?)+)\)", text):
        source = (PACKAGE / path).read_text()
        defined = {n.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        assert all(name in defined or f"{name}:" in source for name in re.findall(r"\w+", names)), path


def test_every_import_in_the_pages_and_the_notebook_works():
    pages = [*PAGES, "README.md", "docs/quickstart.ipynb"]
    pattern = r"from diffusers_ddpm_ext[\w.]* import (?:\([^)]*\)|[^\n\\(]*)"
    lines = {line for page in pages for line in re.findall(pattern, (ROOT / page).read_text())}
    assert len(lines) > 5
    for line in lines:
        exec(line.rstrip('",'), {})


@pytest.mark.parametrize("page", ["docs/maths.md", "docs/likelihood.md", "CONTRIBUTING.md"])
def test_dotted_names_in_the_pages_exist(page):
    """Such as ``diffusion.gaussian.q_sample``, relative to the package."""
    folders = "|".join(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    names = re.findall(rf"`((?:{folders})(?:\.\w+)+)`", (ROOT / page).read_text())
    assert names
    for name in names:
        assert pydoc.locate(f"diffusers_ddpm_ext.{name}") is not None, name


def test_test_files_that_the_pages_name_exist():
    for page in [*PAGES, "README.md", "benchmarks/README.md"]:
        text = (ROOT / page).read_text()
        for path in re.findall(r"((?:tests/)?(?:\w+/)*test_\w+\.py)", text):
            assert (ROOT / "tests" / path.removeprefix("tests/")).is_file() or "_x.py" in path, f"{page}: {path}"


def load_hook(name: str) -> ModuleType:
    """A module that the site's builder calls."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return hook


def test_the_site_links_to_its_source_where_the_address_is_known(monkeypatch):
    hook = load_hook("source_link")
    monkeypatch.delenv("REPO_URL", raising=False)
    assert hook.on_config(SimpleNamespace(extra={})).extra == {}
    monkeypatch.setenv("REPO_URL", "https://github.com/me/it")
    (link,) = hook.on_config(SimpleNamespace(extra={})).extra["social"]
    assert (link["link"], link["icon"]) == ("https://github.com/me/it", "fontawesome/brands/github")
    monkeypatch.setenv("REPO_URL", "javascript:alert()")
    with pytest.raises(ValueError, match="https"):
        hook.on_config(SimpleNamespace(extra={}))


def test_pages_with_wide_tables_have_no_contents_beside_them():
    hook = load_hook("wide_pages")
    for name, meta in [*((name, {"hide": ["toc"]}) for name in hook.WIDE), ("index.md", {})]:
        assert (ROOT / "docs" / name).is_file()
        page = SimpleNamespace(file=SimpleNamespace(src_uri=name), meta={})
        assert hook.on_page_markdown("text", page, config=None) == "text"
        assert page.meta == meta


def test_code_breaks_where_a_reader_expects_it():
    """Names in tables after their dots and underscores, options nowhere, code blocks as they are."""
    change = load_hook("readable_code").on_page_content
    option = '<span class="option">--loss_type</span>'
    assert change("<p><code>a.b_c --loss_type l2</code></p>") == f"<p><code>a.b_c {option} l2</code></p>"
    table = "<table><td><code>a.b_c::d/e --loss_type &amp; 0.5</code></td></table>"
    broken = f"<code>a.<wbr>b_<wbr>c::<wbr>d/<wbr>e {option} &amp; 0.5</code>"
    assert change(table) == f"<table><td>{broken}</td></table>"
    block = "<pre><code>a.b_c --loss_type l2</code></pre>"
    assert change(block) == block
    assert re.sub(r"<[^>]+>", "", change(table)) == re.sub(r"<[^>]+>", "", table), "nothing is added to copied text"


def test_the_notebook_is_a_page_with_its_outputs():
    """Each code cell was run and stored what it printed; pictures have texts, and no path of a machine is in them."""
    hook = load_hook("notebook_page")
    notebook = (ROOT / "docs" / hook.NOTEBOOK).read_text()
    page, pictures = hook.notebook_to_markdown(notebook)
    cells = [cell for cell in json.loads(notebook)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["outputs"] for cell in cells)
    assert set(re.findall(r"^!\[[^\]]{20,}\]\((.+)\)$", page, re.M)) == set(pictures) != set()
    assert all(data.startswith(b"\x89PNG") for data in pictures.values())
    assert page.count("\n```") % 2 == 0
    assert not re.search(r"/(tmp|home|work|root|Users)/", page)
    assert f": {hook.PAGE}\n" in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr[-2000:]
    for page in (tmp_path / "site").rglob("*.html"):
        for target in re.findall(r'href="([^"#:]+)["#]', page.read_text()):
            path = tmp_path / "site" / target.lstrip("/") if target.startswith("/") else page.parent / target
            assert path.exists() or page.name == "404.html", f"{page}: {target}"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its cells in order; those that start with ! are shell commands."""
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    names: dict = {}
    for cell in json.loads((ROOT / "docs/quickstart.ipynb").read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        if text.startswith("!"):
            assert cli.main(shlex.split(text[1:])[1:]) == 0
        else:
            exec(compile(text, "quickstart.ipynb", "exec"), names)
    assert names["pipe"].num_network_calls == 20
