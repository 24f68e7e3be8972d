"""`ddpm-ext verify`: is a pushed pipeline whole, and does it draw what its card shows?"""

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
from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.hub.push import check_repo_id
from diffusers_ddpm_ext.hub.upload import HUB_TIMEOUT, HubTarget, describe_error, hub_timeout, last_pushed_commit
from diffusers_ddpm_ext.pipelines.loading import load_pipeline, select_device
from diffusers_ddpm_ext.utils.option import option, positional

VERIFY_EXAMPLES = """examples:
  ddpm-ext verify me/digits                       the newest commit
  ddpm-ext verify me/digits --folder runs/digits  also: is it the last push from that folder?
  ddpm-ext verify runs/digits                     a local folder, pushed or downloaded before

Each finding is a line; the status is 1 if there is any. On another machine images differ by rounding, which is
allowed for."""


@dataclass(frozen=True)
class VerifyOptions:
    """Check a pipeline that `ddpm-ext push` uploaded to the Hub.

    Downloads the repository again, compares each file with the proof that was pushed with it, opens the pipeline,
    draws the images of the card with their seed, and compares them.
    """

    source: str = positional("ID", "user/name on the Hub, or a local folder.")
    revision: str | None = option(None, "Branch, tag or commit.", metavar="NAME", unset="main")
    folder: Path | None = option(
        None, "The folder that was pushed: is its last push the newest commit?", metavar="FOLDER"
    )
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
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    return verify_pushed(parse_verify_args(argv))


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


def verify_pushed(options: VerifyOptions) -> str:
    """Load, compare and draw.

    Args:
        options: what was asked for.

    Returns:
        One line that says what was found right.

    Raises:
        ConfigError: it cannot be reached, or holds no proof.
        RunError: something is wrong; a sentence for each finding.
    """
    from diffusers_ddpm_ext.hub.proof import PROOF_NAME, compare_card_images, differences_from_proof, read_proof

    device = select_device(options.device)
    with _loaded(options) as (place, findings):
        try:
            facts = read_proof(place)
        except ValueError as error:
            raise RunError(f"{options.source}: {'; '.join([*findings, str(error)])}") from None
        if facts is None:
            raise ConfigError(f"{options.source} holds no {PROOF_NAME}: it was not pushed by `ddpm-ext push`")
        findings += differences_from_proof(place, facts)
        drawn, agreed = facts["images"], ""
        try:
            pipeline = load_pipeline(str(place), None, device, "float32")
            if drawn is not None and (place / "card" / "samples.npz").is_file():
                wrong, share = compare_card_images(place, pipeline, drawn)
                findings += [wrong] if wrong else []
                agreed = f"; its {drawn['count']} images, drawn again, agree in {share:.2%} of their pixels"
        except (ConfigError, ValueError, OSError) as error:
            findings.append(f"it cannot be opened and drawn from: {' '.join(str(error).split())[:300]}")
    if findings:
        raise RunError(f"{options.source}: {'; '.join(findings)}")
    return f"{options.source}: {len(facts['files'])} files are what was pushed{agreed}"


@contextmanager
def _loaded(options: VerifyOptions) -> Iterator[tuple[Path, list[str]]]:
    """The repository in a folder of its own, loaded anew, and what its history says."""
    if options.is_local:
        yield Path(options.source), []
        return
    if options.hub_token is not None:
        os.environ["HF_TOKEN"] = options.hub_token
    with tempfile.TemporaryDirectory(prefix="verify-") as name, hub_timeout(options.timeout):
        try:
            findings = _fetch(options, Path(name))
        except Exception as error:  # of the client or the transport
            target = HubTarget(options.source, token=options.hub_token)
            raise ConfigError(f"cannot load {options.source}: {describe_error(error, target)}") from None
        yield Path(name), findings


def _fetch(options: VerifyOptions, place: Path) -> list[str]:
    from huggingface_hub import HfApi

    api: Any = HfApi(token=options.hub_token)
    newest = api.model_info(options.source).sha
    wanted = api.model_info(options.source, revision=options.revision).sha if options.revision else newest
    api.snapshot_download(options.source, revision=wanted, local_dir=place)
    findings = []
    if wanted != newest:
        findings.append(f"{options.revision} is commit {wanted[:12]}, main has gone on to {newest[:12]}")
    pushed = last_pushed_commit(options.source, options.folder)
    if pushed is not None and pushed != wanted:
        whence = options.folder or "this machine"
        findings.append(f"this is commit {wanted[:12]}, but what {whence} pushed last is {pushed[:12]}")
    return findings
