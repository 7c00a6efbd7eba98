"""Measures what speed and memory are claimed of; ratios within one run, on this machine.

    python tools/benchmark.py debias              # stage 3: the presets against the naive way
    python tools/benchmark.py voc --samples DIR   # stage 3 as a whole on images like VOC's
    python tools/benchmark.py crf                 # our dense CRF against pydensecrf, one core
    python tools/benchmark.py train               # a step of MARS against plain cross entropy
    python tools/benchmark.py evaluate            # images scored per second, PNG decoding included
    python tools/benchmark.py walk                # IRNet's random walk: steps against matrix power
    python tools/benchmark.py growth              # time and memory by images, their size, classes

`debias` and `crf` draw pictures, or read photographs with COCO's objects below --samples, and take
turns between the presets or backends. Without --samples the agreement says little. `evaluate` draws
1,449 masks and predictions of 500 x 375 pixels, or repeats those of --masks; the median of five
measurements.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.run.errors import run_script
from core.run.files import user_path
from tools.benchmarks.crf import benchmark_crf
from tools.benchmarks.evaluation import benchmark_evaluate
from tools.benchmarks.growth import benchmark_growth
from tools.benchmarks.stage3 import benchmark_debias, benchmark_voc
from tools.benchmarks.training import benchmark_train
from tools.benchmarks.walk import benchmark_walk


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", choices=("debias", "voc", "crf", "train", "evaluate", "walk", "growth")
    )
    parser.add_argument("--masks", type=user_path, help="evaluate: real masks, repeated to 1,449")
    parser.add_argument(
        "--samples", type=user_path, help="folder that holds coco_sample and voc_lists"
    )
    parser.add_argument("--images", type=int, default=1000, help="voc: so many of its list")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {options.workers} workers, torch {torch.__version__}")
    if options.what == "debias":
        benchmark_debias(options.samples)
    elif options.what == "voc":
        benchmark_voc(options.samples, options.images)
    elif options.what == "crf":
        benchmark_crf(options.samples)
    elif options.what == "train":
        benchmark_train()
    elif options.what == "evaluate":
        benchmark_evaluate(options.masks, options.workers)
    elif options.what == "walk":
        benchmark_walk()
    else:
        benchmark_growth(options.workers)


if __name__ == "__main__":
    run_script(main)
