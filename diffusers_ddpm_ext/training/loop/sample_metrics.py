"""Metrics of samples during a run, of the weights that its pipeline samples with."""

from __future__ import annotations

from accelerate.utils import broadcast_object_list

from diffusers_ddpm_ext.errors import Interrupted, warn
from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.plotting.scores import plot_score, score_keys
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.training.distributed import fail_together
from diffusers_ddpm_ext.training.evaluation.processes import Processes
from diffusers_ddpm_ext.training.evaluation.sample_scores import SampleScores
from diffusers_ddpm_ext.training.evaluation.samples import SampleDraws
from diffusers_ddpm_ext.training.loop.export import ExportedNetworks
from diffusers_ddpm_ext.training.loop.previews import IMAGE_FOLDER, sampling_networks
from diffusers_ddpm_ext.training.loop.run import Run
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.utils.files import METRICS
from diffusers_ddpm_ext.utils.run_metrics import read_metrics
from diffusers_ddpm_ext.utils.vocabulary import SCORES


def sample_metrics(setup: Setup, processes: Processes) -> dict[str, float]:
    """The metrics of samples by name, empty without ``validation_metrics``. Collective call; it changes no weight.

    The main process draws them: image i has the noise of image i of `ddpm-ext sample` with the run's seed, so that all
    validations see the same noise.
    """
    scores = setup.sample_scores
    if scores is None:
        return {}
    networks = sampling_networks(setup)
    found: list[dict[str, float]] = [{}]
    with fail_together(setup.accelerator):
        if networks is not None:
            found = [_measure(setup, scores, networks, processes)]
    broadcast_object_list(found)
    suffix = "" if setup.ema is None else "_ema"
    values = {f"val/{name}{suffix}": value for name, value in found[0].items()}
    return values | {"val/num_samples": scores.count}


def _measure(setup: Setup, scores: SampleScores, networks: ExportedNetworks, processes: Processes) -> dict[str, float]:
    """Draw and measure; NaN for samples that are not finite, and where a signal interrupts it."""
    parts, output = setup.parts, setup.config.output
    pipeline = DDPMExtPipeline(
        networks.default,
        DDPMExtScheduler.from_config(parts.scheduler.config),
        **networks.pipeline_kwargs(parts.pipeline_kwargs),
    )
    pipeline.class_embedder = networks.class_embedder
    pipeline.set_progress_bar_config(disable=True)
    conditions = setup.validation_samples
    assert conditions is not None
    arguments = {
        "num_inference_steps": min(output.ddpm_num_inference_steps, setup.num_train_timesteps),
        "guidance_scale": output.preview_guidance_scale,
    }

    def check_stop() -> None:
        if not processes.lockstep and processes.stop_requested():
            raise Interrupted

    has_conditions = scores.images.columns is not None
    draws = SampleDraws(
        pipeline, setup.seed, conditions if has_conditions else None, setup.data.captions, arguments, check_stop
    )
    try:
        return scores.measure(draws)
    except Interrupted:  # the validation is repeated
        return scores.missing()
    except ValueError as error:  # the network overflows in sampling, which the losses need not show
        warn(f"the samples could not be measured: {error}")
        return scores.missing()


def draw_scores(run: Run) -> None:
    """Draw each metric over the run, as ``samples/<metric>.png``; in the main process."""
    scores, suffix = run.setup.sample_scores, "" if run.setup.ema is None else "_ema"
    if scores is None:
        return
    names = [score for metric in scores.names for score in SCORES[metric]]
    metrics = read_metrics(run.folder / METRICS, [key for name in names for key in score_keys(name, suffix)])
    for name in names:
        plot_score(run.folder / IMAGE_FOLDER / f"{name}.png", metrics.curves, name, suffix, scores.count)
