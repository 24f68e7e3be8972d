"""`ddpm-ext verify`: check that a pushed pipeline is intact and draws the images of its card."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.cli.arguments import check_pipeline_source
from diffusers_ddpm_ext.cli.parser import parse_options
from diffusers_ddpm_ext.errors import ConfigError, RunError, printable
from diffusers_ddpm_ext.hub.upload import (
    HUB_TIMEOUT,
    PUSH_RECORD,
    check_repo_id,
    describe_error,
    hub_timeout,
    last_pushed_commit,
)
from diffusers_ddpm_ext.pipelines.loading import load_pipeline, select_device
from diffusers_ddpm_ext.utils.folder_scan import list_names
from diffusers_ddpm_ext.utils.option import option, positional

VERIFY_EXAMPLES = """examples:
  ddpm-ext verify me/digits                       the newest commit
  ddpm-ext verify me/digits --folder runs/digits  also: is it the last push from that folder?
  ddpm-ext verify runs/digits                     a local folder, pushed or downloaded before
  ddpm-ext verify runs/digits --no_images         its files alone, in a second

Each finding is a line; the status is 1 if there is any. On another machine images differ by rounding, which is
allowed for."""


@dataclass(frozen=True)
class VerifyOptions:
    """Check a pipeline that `ddpm-ext push` uploaded to the Hub.

    Downloads the repository again and compares each file with the proof that was pushed with it; a file that the
    proof does not name is a finding. Then opens the pipeline, draws the card's images with their seed, and compares
    them.
    """

    source: str = positional("ID", "user/name on the Hub, or a local folder.", path=True)
    revision: str | None = option(None, "Branch, tag or commit.", metavar="NAME", unset="main")
    folder: Path | None = option(
        None, "The folder that was pushed: is its last push the newest commit?", metavar="FOLDER"
    )
    no_images: bool = option(False, "Compare the files alone: do not open the pipeline, draw nothing.")
    device: str = option("cpu", "Device to draw on. The card's images were drawn on cpu.", metavar="NAME")
    timeout: float = option(HUB_TIMEOUT, "How long the Hub may take to answer.", above=0, metavar="SECONDS")
    hub_token: str | None = option(
        None, "Token of the Hub.", metavar="TOKEN", unset="HF_TOKEN, or the one that `hf auth login` stored"
    )

    @property
    def is_local(self) -> bool:
        """Whether the source is a local folder."""
        return Path(self.source).is_dir()


def verify_command(argv: Sequence[str]) -> str:
    """Run `ddpm-ext verify`: download, compare and draw; returns a line that says what was checked.

    Raises:
        ConfigError: an option is wrong, the repository cannot be reached, or it has no proof.
        RunError: something is wrong; a sentence for each finding.
    """
    options = parse_verify_args(argv)  # before the imports, so that --help loads no numpy
    from diffusers_ddpm_ext.hub.proof import PROOF_NAME, differences_from_proof, entries_beside_push, read_proof

    if options.device != "cpu":
        select_device(options.device)  # loads torch, which a changed folder does not need
    with _local_copy(options) as (folder, findings):
        own_run = options.is_local and (folder / PUSH_RECORD).is_file()
        try:
            proof = read_proof(folder)
            if proof is not None:
                findings += differences_from_proof(folder, proof, own_run)
        except ValueError as error:
            raise RunError(f"{options.source}: {'; '.join([*findings, str(error)])}") from None
        if proof is None:
            raise ConfigError(f"{options.source} has no {PROOF_NAME}: it was not pushed by `ddpm-ext push`")
        agreement, beside = "", entries_beside_push(folder, proof) if own_run else []
        if not findings and not options.no_images:  # nothing of a changed folder is opened
            difference, agreement = _compare_images(folder, select_device(options.device), proof["images"])
            findings += difference
    if findings:
        raise RunError(f"{options.source}: {'; '.join(findings)}")
    unchecked = f"; not part of a push and not checked: {list_names(beside)}" if beside else ""
    return f"{options.source}: {len(proof['files'])} files are what was pushed{agreement}{unchecked}"


def parse_verify_args(argv: Sequence[str]) -> VerifyOptions:
    """The options of a command line, checked; errors are those of `parse_options`."""
    options = parse_options(VerifyOptions, argv, "verify", VERIFY_EXAMPLES)
    check_pipeline_source(options.source)
    if options.folder is not None and not options.folder.is_dir():
        raise ConfigError(f"--folder {options.folder} is not a folder: leave it out, or give the one that was pushed")
    if options.is_local and (options.revision is not None or options.folder is not None):
        raise ConfigError(
            f"{options.source} is a local folder: --revision and --folder are about the Hub, leave them out"
        )
    if not options.is_local:
        check_repo_id(options.source, "ID")
    return options


def _compare_images(folder: Path, device: Any, drawn: dict[str, Any] | None) -> tuple[list[str], str]:
    """Open the pipeline and draw the card's images again; what differs, and how well they agree."""
    from diffusers_ddpm_ext.hub.proof import CARD_IMAGES, PROOF_NAME, compare_card_images

    has_images = (folder / CARD_IMAGES).is_file()
    if has_images != (drawn is not None):
        return [f"{CARD_IMAGES} and its settings in {PROOF_NAME} do not belong together"], ""
    try:
        pipeline = load_pipeline(str(folder), None, device, "float32")
        if drawn is None:
            return [], ""
        difference, share = compare_card_images(folder, pipeline, drawn)
    except Exception as error:  # whatever a model raises that somebody made up
        return [f"it cannot be opened or sampled: {printable(' '.join(str(error).split()), 300)}"], ""
    agreement = f"; its {drawn['count']} images, drawn again, agree in {share:.2%} of their pixels"
    return [difference] if difference else [], agreement


@contextmanager
def _local_copy(options: VerifyOptions) -> Iterator[tuple[Path, list[str]]]:
    """The repository, downloaded again into a temporary folder, and findings about its commits."""
    if options.is_local:
        yield Path(options.source), []
        return
    if options.hub_token is not None:
        os.environ["HF_TOKEN"] = options.hub_token
    with tempfile.TemporaryDirectory(prefix="verify-") as name, hub_timeout(options.timeout):
        try:
            findings = _download(options, Path(name))
        except ConfigError:
            raise
        except Exception as error:  # of the client or the transport
            reason = describe_error(error, options.source, options.hub_token)
            raise ConfigError(f"cannot load {options.source}: {reason}") from None
        yield Path(name), findings


def _download(options: VerifyOptions, target: Path) -> list[str]:
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # they show names of the repository as they are
    api: Any = HfApi(token=options.hub_token)
    newest = api.model_info(options.source).sha
    revision = api.model_info(options.source, revision=options.revision).sha if options.revision else newest
    api.snapshot_download(options.source, revision=revision, local_dir=target)
    findings = []
    if revision != newest:
        findings.append(f"{options.revision} is commit {revision[:12]}, the newest commit of main is {newest[:12]}")
    pushed = last_pushed_commit(options.source, options.folder)
    if pushed is not None and pushed != revision:
        pusher = options.folder or "this machine"
        findings.append(f"this is commit {revision[:12]}, but the last push from {pusher} is {pushed[:12]}")
    return findings
