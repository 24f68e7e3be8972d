"""Does a class-conditional run of the digits draw the requested digit?

    ddpm-ext train --conditioning_key adm --output_dir runs/classes
    python benchmarks/digits_classes.py runs/classes [--num_images 500] [--steps 250] [--guidance_scale 1 2]

A logistic regression is trained on one half of the real digits and classifies the other half and samples of each
class. Reported: the share of samples classified as the requested digit, and the accuracy on real digits. Required: at
least ``--required`` without guidance. Exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from diffusers_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.utils import random_keys as keys


def main() -> int:
    """Sample every class and classify the samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1.0])
    parser.add_argument("--required", type=float, default=0.9, help="share without guidance")
    parser.add_argument("--json", type=Path, help="also write the shares to this file")
    options = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order] / 16.0, labels[order]
    half = len(images) // 2
    classifier = LogisticRegression(max_iter=5000).fit(images[:half], labels[:half])
    real = float(classifier.score(images[half:], labels[half:]))
    print(f"real digits            {real:.4f} classified correctly")
    pipeline = DDPMExtPipeline.from_pretrained(options.folder)
    pipeline.set_progress_bar_config(disable=True)
    requested = np.arange(options.num_images) % 10
    shares = {}
    for scale in options.guidance_scale:
        drawn = []
        for start in range(0, options.num_images, 100):
            labels_of_batch = requested[start : start + 100]
            generators = [keys.generator("digits_classes", start + index) for index in range(len(labels_of_batch))]
            output = pipeline(
                len(labels_of_batch),
                generators,
                num_inference_steps=options.steps,
                output_type="np",
                class_labels=labels_of_batch.tolist(),
                guidance_scale=scale,
            )
            drawn.append(output.images.reshape(len(labels_of_batch), -1))
        predicted = classifier.predict(np.concatenate(drawn))
        share = float((predicted == requested).mean())
        each = " ".join(f"{(predicted[requested == digit] == digit).mean():.2f}" for digit in range(10))
        print(f"guidance_scale {scale:<5g}   {share:.4f} classified as requested; by digit {each}", flush=True)
        shares[f"{scale:g}"] = share
    if options.json is not None:
        report = {"real": real, "requested": shares, "samples": options.num_images, "steps": options.steps}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(shares.get("1", 1.0) < options.required)


if __name__ == "__main__":
    sys.exit(main())
