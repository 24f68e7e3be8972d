"""Does a class-conditional run of the digits draw the digit that is asked for?

    ddpm-ext train --conditioning_key adm --output_dir runs/classes
    python benchmarks/digits_classes.py runs/classes [--num_images 500] [--steps 250] [--guidance_scale 1 2]

A logistic regression is trained on one half of the real digits; it looks at the other half and at samples of each
class. Reported: how often it sees the digit that was asked for, and how often the right one in real digits. Wanted: at
least 0.9, without guidance. Exit status 1 if that is missed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from diffusers_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.utils import random_keys as keys

WANTED = 0.9


def main() -> int:
    """Ask for digits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1.0])
    options = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order] / 16.0, labels[order]
    half = len(images) // 2
    classifier = LogisticRegression(max_iter=5000).fit(images[:half], labels[:half])
    print(f"real digits            {classifier.score(images[half:], labels[half:]):.4f} seen as what they are")
    pipeline = DDPMExtPipeline.from_pretrained(options.folder)
    pipeline.set_progress_bar_config(disable=True)
    asked = np.arange(options.num_images) % 10
    passed = True
    for scale in options.guidance_scale:
        drawn = []
        for start in range(0, options.num_images, 100):
            some = asked[start : start + 100]
            generators = [keys.generator("digits_classes", start + index) for index in range(len(some))]
            output = pipeline(
                len(some),
                generators,
                num_inference_steps=options.steps,
                output_type="np",
                class_labels=some.tolist(),
                guidance_scale=scale,
            )
            drawn.append(output.images.reshape(len(some), -1))
        seen = classifier.predict(np.concatenate(drawn))
        share = float((seen == asked).mean())
        each = " ".join(f"{(seen[asked == digit] == digit).mean():.2f}" for digit in range(10))
        print(f"guidance_scale {scale:<5g}   {share:.4f} seen as what was asked for; by digit {each}", flush=True)
        passed = passed and (share >= WANTED or scale != 1)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
