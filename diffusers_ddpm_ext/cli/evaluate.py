"""`ddpm-ext evaluate`: bits per dimension of held-out images, with a confidence interval; or metrics of samples."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusers_ddpm_ext.cli.arguments import (
    FOLDER_HELP,
    check_no_input,
    check_not_locked,
    check_output_path,
    check_pipeline_source,
    check_result_file,
    lock_output_folder,
)
from diffusers_ddpm_ext.cli.extras import TRAIN_MODULES, require_modules
from diffusers_ddpm_ext.cli.measuring import (
    ConditionedUNet,
    MeasuringOptions,
    caption_encoder,
    check_bin_width,
    choose_decoder,
    data_inputs,
    ddpm_scheduler,
    image_options,
    images_of_split,
    join_processes,
    load_images,
)
from diffusers_ddpm_ext.cli.parser import parse_options
from diffusers_ddpm_ext.cli.pipeline_facts import PipelineFacts, facts_of_pipeline, read_pipeline_facts
from diffusers_ddpm_ext.cli.sample_metrics_options import SAMPLES_HELP, SampleMetricsOptions, sample_metrics_options
from diffusers_ddpm_ext.cli.sample_options import check_timesteps_options
from diffusers_ddpm_ext.errors import ConfigError, RunError, as_config_error, as_run_error, printable
from diffusers_ddpm_ext.pipelines.loading import load_pipeline
from diffusers_ddpm_ext.utils.folder_lock import FolderLock
from diffusers_ddpm_ext.utils.option import embedded, option, options_of, positional

if TYPE_CHECKING:
    from diffusers_ddpm_ext.diffusion.likelihood_estimate import StepBits, Strata
    from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
    from diffusers_ddpm_ext.training.config.data_options import DataOptions
    from diffusers_ddpm_ext.training.evaluation.bound import BoundEvaluation, BoundValues
    from diffusers_ddpm_ext.training.evaluation.cache import EvaluationCache
    from diffusers_ddpm_ext.training.evaluation.processes import Processes

EVALUATION_NAME = "evaluation"
EVALUATE_EXAMPLES = """examples:
  ddpm-ext evaluate runs/digits                              all steps of all held-out digits
  ddpm-ext evaluate runs/digits --num_timesteps 20           20 steps of each image, unbiased: T/20 times as fast
  ddpm-ext evaluate runs/digits --num_inference_steps 50     the bound of the chain of 50 steps that sampling takes
  ddpm-ext evaluate runs/photos --validation_data_dir other --json bits.json --device cuda
  accelerate launch -m diffusers_ddpm_ext evaluate runs/photos      on as many devices as configured
  ddpm-ext evaluate runs/digits --metrics fd kid prdc --num_samples 2000          quality of samples
  ddpm-ext evaluate runs/photos --metrics kid --feature_extractor facebook/dinov2-base --scheduler DDIMScheduler
  ddpm-ext evaluate runs/digits --metrics kid --samples elsewhere.npz
  ddpm-ext evaluate runs/digits --memorization                      are samples copies of training images?

Writes evaluation.json, steps.csv (every step that was drawn) and steps.png to FOLDER/evaluation (--out). The same
command resumes where it was interrupted. Metrics of samples go to sample_metrics.json there, --memorization also to
copies.png (samples beside their nearest training images) and loss_gap.png."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(MeasuringOptions):
    """Bits per dimension of held-out images: the variational bound on their negative log-likelihood.

    Prints the bound and its parts (prior, steps, decoder), with a confidence interval over images. By default it uses
    the run's own validation images, and all T steps of each. With --metrics: how good samples are.
    """

    folder: str = positional("FOLDER", FOLDER_HELP, path=True)
    num_timesteps: int | None = option(None, "Steps of each image.", low=1, none="all", metavar="all|K")
    num_inference_steps: int | None = option(
        None, "Evaluate the shorter chain that sampling with K steps takes.", low=1, metavar="K", unset="all T"
    )
    optimal_timesteps: bool = option(False, "Use the K steps that `ddpm-ext fit-variance` found best.")
    split: Literal["validation", "train"] = option("validation", "Which images.")
    max_images: int | None = option(None, "At most N images, evenly spaced in all of them.", low=1, unset="all")
    weights: Literal["ema", "raw"] | None = option(None, "Averaged or raw weights.", unset="those that sampling takes")
    confidence: float = option(0.95, "Confidence of the interval.", above=0, below=1, metavar="P")
    clip_denoised: bool = option(False, "Clip the predicted image to [-1, 1], as sampling may.")
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = option("float32", "Precision of the network.")
    json: Path | None = option(None, "Also write the result to this file.", metavar="FILE.json")
    out: Path | None = option(None, "Folder of the result.", metavar="DIR", unset="FOLDER/evaluation")
    sample_metrics: dict[str, Any] = embedded(SampleMetricsOptions, SAMPLES_HELP)

    @property
    def output_folder(self) -> Path:
        """Folder of the result: ``--out``, or its default."""
        if self.out is not None:
            return self.out
        folder = Path(self.folder)
        return folder / EVALUATION_NAME if folder.is_dir() else Path(f"{folder.name}-{EVALUATION_NAME}")


def evaluate_command(argv: Sequence[str]) -> str:
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    options = parse_evaluate_args(argv)
    require_modules({**TRAIN_MODULES, "scipy": "scipy"})
    samples_options = sample_metrics_options(options.sample_metrics)
    if samples_options is None:
        return evaluate(options)
    from diffusers_ddpm_ext.cli.sample_metrics import evaluate_samples

    return evaluate_samples(options, samples_options)


def parse_evaluate_args(argv: Sequence[str]) -> EvaluateOptions:
    """The options of a command line, checked; errors are those of `parse_options`."""
    options = parse_options(EvaluateOptions, argv, "evaluate", EVALUATE_EXAMPLES)
    check_bin_width(options)
    samples_options = sample_metrics_options(options.sample_metrics)
    if samples_options is not None:
        _check_sample_metrics(options, samples_options)
        check_timesteps_options(samples_options.timesteps, options.num_inference_steps, options.optimal_timesteps)
    if options.optimal_timesteps and options.num_inference_steps is None:
        raise ConfigError("--optimal_timesteps needs --num_inference_steps: the number of steps")
    check_pipeline_source(options.folder)
    check_output_path("--out", options.output_folder, "folder")
    check_no_input("--out", options.output_folder, data_inputs(options.data))
    check_not_locked("--out", FolderLock(options.output_folder))
    if options.json is not None:
        check_result_file("--json", options.json, ("bits_per_dim", "features"))
    return options


def _check_sample_metrics(options: EvaluateOptions, samples_options: SampleMetricsOptions) -> None:
    """Refuse options that have no effect on metrics of samples, and paths that cannot be."""
    defaults = {name: each.default for name, each in options_of(EvaluateOptions).items()}
    for name in ("num_timesteps", "clip_denoised", "decoder", "bin_width"):
        if getattr(options, name) != defaults[name]:
            raise ConfigError(f"--{name} has no effect on --metrics and --memorization: leave it out")
    if samples_options.samples is not None:
        for name in ("num_inference_steps", "optimal_timesteps", "weights"):
            if getattr(options, name) != defaults[name]:
                raise ConfigError(f"--{name} has no effect on --samples, which are not drawn: leave one out")
        if not samples_options.samples.exists():
            raise ConfigError(f"--samples {printable(str(samples_options.samples), 300)} does not exist")
        check_no_input("--out", options.output_folder, {"--samples": samples_options.samples})
    if samples_options.feature_cache is not None:
        check_output_path("--feature_cache", samples_options.feature_cache, "folder")


def evaluate(options: EvaluateOptions) -> str:
    """Evaluate the bound, write the result, and return the lines to print, none except on the main process.

    Raises:
        ConfigError: the pipeline cannot be loaded, or an option does not fit it.
        RunError: the bound is not finite, or the result cannot be written.
    """
    weights_option = f"--weights {options.weights}"
    facts = read_pipeline_facts(options.folder, weights_variant(options), weights_option)
    image_data = None if facts is None else check_evaluation(options, facts)  # before torch is imported
    import torch

    from diffusers_ddpm_ext.cli.measured_latents import as_samples, describe_first_stage
    from diffusers_ddpm_ext.diffusion.levels import choose_bins
    from diffusers_ddpm_ext.diffusion.likelihood_estimate import step_table
    from diffusers_ddpm_ext.training.distributed import leave_process_group
    from diffusers_ddpm_ext.training.evaluation.bound import BoundEvaluation
    from diffusers_ddpm_ext.training.evaluation.cache import EvaluationCache

    processes = join_processes(options.device)
    pipeline = load_pipeline(options.folder, weights_variant(options), processes.device, options.dtype, weights_option)
    scheduler = ddpm_scheduler(pipeline, options.folder, "chain to evaluate")
    if facts is None or image_data is None:
        facts = facts_of_pipeline(options.folder, pipeline)
        image_data = check_evaluation(options, facts)
    data = load_images(options.folder, pipeline, image_data, processes.rank == 0)
    images = images_of_split(data, options.split)
    with as_config_error("--decoder"):
        decoder, bin_width = choose_bins(choose_decoder(options, facts), options.bin_width, images.levels)
    evaluation = BoundEvaluation(
        scheduler,
        as_samples(pipeline, images, options.seed, options.folder),
        _choose_strata(options, scheduler),
        options.max_images,
        options.seed,
        batch_size=options.batch_size,
        dtype=getattr(torch, options.dtype),
        clip_denoised=options.clip_denoised,
        decoder=decoder,
        bin_width=bin_width,
    )
    folder, is_main = options.output_folder, processes.rank == 0
    with lock_output_folder("--out", folder) if is_main else nullcontext():
        cache = EvaluationCache(folder, _fingerprint(options, data.fingerprint, pipeline), processes)
        network = ConditionedUNet(pipeline, caption_encoder(pipeline, data))
        values = _evaluate_bound(network, evaluation, processes, cache, options.folder)
        leave_process_group()
        if not is_main:
            return ""
        result = _result(options, evaluation, values, scheduler, data.description) | describe_first_stage(pipeline)
        with as_run_error(folder):
            _write(options, result, step_table(values.bits, values.places, scheduler.kept.timesteps))
        cache.delete()
    return _summary(result, options)


def check_evaluation(options: EvaluateOptions, facts: PipelineFacts) -> DataOptions:
    """Check options against a pipeline's configuration; the options of its images.

    Raises:
        ConfigError: an option does not fit the model, or the images are not specified.
    """
    trained, steps = facts.num_train_timesteps, options.num_inference_steps
    if steps is not None and steps > trained:
        raise ConfigError(f"--num_inference_steps {steps}: {facts.source} was trained with {trained} steps")
    chain = trained if steps is None else steps
    count = options.num_timesteps
    if count is not None and not 2 <= count <= chain:
        raise ConfigError(f"--num_timesteps {count} must be in [2, {chain}], or 'all'")
    choose_decoder(options, facts)
    if facts.first_stage is not None and chain < trained and not facts.has_own_variances:
        raise ConfigError(
            f"--num_inference_steps {steps}: without fitted variances the density of latents in few steps says "
            f"nothing about the model: first ddpm-ext fit-variance {facts.source}"
        )
    return image_options(facts, options.data)


def _choose_strata(options: EvaluateOptions, scheduler: DDPMExtScheduler) -> Strata:
    """Set the scheduler's timesteps, and divide the chain into strata."""
    from diffusers_ddpm_ext.diffusion.likelihood_estimate import Strata

    try:
        if options.num_inference_steps is not None:
            scheduler.set_timesteps(options.num_inference_steps, optimal=options.optimal_timesteps)
        return Strata.from_schedule(scheduler.kept, options.num_timesteps)
    except ValueError as error:
        flag = "num_timesteps" if str(error).startswith("num_timesteps") else "num_inference_steps"
        raise ConfigError(f"--{flag}: {error}") from None


def _evaluate_bound(
    network: ConditionedUNet, evaluation: BoundEvaluation, processes: Processes, cache: EvaluationCache, folder: str
) -> BoundValues:
    """Evaluate with a progress bar; raise RunError if the bound is not finite."""
    import numpy as np
    from tqdm import tqdm

    from diffusers_ddpm_ext.training.evaluation.bound import evaluate_bound

    network.pipeline.unet.eval()
    total = -(-evaluation.rows // processes.world_size)
    with tqdm(total=total, desc="evaluating", unit="row", disable=processes.rank > 0) as bar:
        values = evaluate_bound(network, evaluation, processes, cache, bar.update)
    if not np.isfinite(values.bits).all():
        index = int(values.places[~np.isfinite(values.bits)].min())
        step = int(evaluation.scheduler.kept.timesteps[index])
        raise RunError(f"the bound is not finite at step {step} of {folder}")
    return values


def _result(
    options: EvaluateOptions,
    evaluation: BoundEvaluation,
    values: BoundValues,
    scheduler: DDPMExtScheduler,
    data_description: Any,
) -> dict[str, Any]:
    """The content of evaluation.json."""
    from diffusers_ddpm_ext.diffusion.likelihood_estimate import estimate

    kept, has_ema = scheduler.kept, (Path(options.folder) / "ema.json").is_file()
    return asdict(estimate(values.bits, values.prior, evaluation.strata, options.confidence)) | {
        "num_timesteps": len(evaluation.strata),
        "chain": len(kept),
        "chain_timesteps": "all" if kept is scheduler.schedule else kept.timesteps.tolist(),
        "weights": options.weights or ("ema" if has_ema else "default"),
        "split": options.split,
        "seed": options.seed,
        "decoder_kind": evaluation.decoder,
        "bin_width": None if evaluation.decoder == "continuous" else evaluation.bin_width,
        "clip_denoised": options.clip_denoised,
        "unit": "bits per dimension",
        "data": data_description,
    }


def weights_variant(options: EvaluateOptions) -> str | None:
    """Variant of the weights: averaged weights are the default files, raw ones are the variant ``raw``."""
    has_ema = (Path(options.folder) / "ema.json").is_file()
    if options.weights == "ema" and Path(options.folder).is_dir() and not has_ema:
        raise ConfigError(f"--weights ema: {options.folder} has no averaged weights (no ema.json): leave it out")
    is_raw = options.weights == "raw" and (has_ema or not Path(options.folder).is_dir())
    return "raw" if is_raw else None


def _fingerprint(options: EvaluateOptions, data_fingerprint: str, pipeline: Any) -> str:
    """Hash of everything that the rows depend on."""
    import torch

    from diffusers_ddpm_ext.cli.measured_latents import describe_first_stage

    unused = ("json", "out", "data", "confidence", "sample_metrics")
    relevant = {name: value for name, value in vars(options).items() if name not in unused}
    weights = hashlib.sha256()
    for name, tensor in sorted(pipeline.unet.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    parts = [json.dumps(relevant, sort_keys=True, default=str), data_fingerprint, weights.hexdigest()]
    parts.append(json.dumps(dict(pipeline.scheduler.config), sort_keys=True, default=str))
    parts.append(json.dumps(describe_first_stage(pipeline)))
    if pipeline.text_encoder_stage is not None:
        parts.append(pipeline.text_encoder_stage.content_hash())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _write(options: EvaluateOptions, result: dict[str, Any], table: list[StepBits]) -> None:
    from diffusers_ddpm_ext.plotting.chain import plot_steps
    from diffusers_ddpm_ext.utils.files import write_text_atomically

    folder, rows = options.output_folder, io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["timestep", "bits_per_dim", "standard_error", "draws"])
    writer.writerows([t, f"{mean:.9g}", "" if error is None else f"{error:.3g}", n] for t, mean, error, n in table)
    write_text_atomically(folder / "steps.csv", rows.getvalue())
    steps, means = [row.timestep for row in table], [row.mean for row in table]
    plot_steps(folder / "steps.png", steps, means, result["bits_per_dim"], result["unit"])
    for path in (folder / f"{EVALUATION_NAME}.json", options.json):
        if path is not None:
            write_text_atomically(path, json.dumps(result, indent=1) + "\n")


def _summary(result: dict[str, Any], options: EvaluateOptions) -> str:
    interval = "  (a single image has no interval)"
    if result["low"] is not None:
        interval = f"  {100 * result['confidence']:g} % interval {result['low']:.4f} to {result['high']:.4f}"
    kind = "" if result["decoder_kind"] != "continuous" else " (of the density: no levels are counted)"
    stage = result.get("first_stage")
    note = [] if stage is None else [f"comparable only for the same first stage ({stage['sha256'][:8]}) and scale"]
    return "\n".join(
        [
            f"{result['unit']}{kind}  {result['bits_per_dim']:.4f}{interval}",
            *(f"  {name:<7}  {result[name]:.4f}" for name in ("prior", "steps", "decoder")),
            f"{result['num_images']:,} images, {result['num_timesteps']:,} of the {result['chain']:,} steps of the"
            f" chain each; written to {options.output_folder}",
            *note,
        ]
    )
