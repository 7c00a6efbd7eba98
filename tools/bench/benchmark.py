"""Measures speed and memory on this machine, as ratios within one run.

    python tools/bench/benchmark.py debias [--samples DIR]

    debias      stage 3: feature cells against a naive implementation
    voc         the complete stage 3 on images like VOC's; needs --samples
    crf         our dense CRF against pydensecrf, one core
    train       a step of MARS against plain cross entropy
    depthwise   a step of EfficientNet-Lite0 with and without our gradient
    evaluate    images scored per second, including PNG decoding
    walk        IRNet's random walk: steps against the matrix power
    growth      time and memory by number of images, their size, and number of classes

`debias` and `crf` draw pictures, or read photographs with COCO's objects below --samples, and
alternate between implementations. Without --samples, the agreement means little. `evaluate`
draws 1,449 masks and predictions of 500 x 375 pixels, or repeats the masks of --masks; it prints
the median of five measurements.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.run.errors import run_script
from core.run.files import user_path
from tools.bench.crf import benchmark_crf
from tools.bench.evaluation import benchmark_evaluate
from tools.bench.growth import benchmark_growth
from tools.bench.stage3 import benchmark_debias, benchmark_voc
from tools.bench.training import benchmark_depthwise, benchmark_train
from tools.bench.walk import benchmark_walk
from tools.common import tool_parser

BENCHMARKS = {
    "debias": lambda options: benchmark_debias(options.samples),
    "voc": lambda options: benchmark_voc(options.samples, options.images),
    "crf": lambda options: benchmark_crf(options.samples),
    "train": lambda options: benchmark_train(),
    "depthwise": lambda options: benchmark_depthwise(),
    "evaluate": lambda options: benchmark_evaluate(options.masks, options.workers),
    "walk": lambda options: benchmark_walk(),
    "growth": lambda options: benchmark_growth(options.workers),
}


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("what", choices=BENCHMARKS)
    parser.add_argument("--masks", type=user_path, help="evaluate: real masks, repeated to 1,449")
    parser.add_argument("--samples", type=user_path, help="folder with coco_sample and voc_lists")
    parser.add_argument(
        "--images", type=int, default=1000, help="voc: number of images of its list"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {options.workers} workers, torch {torch.__version__}")
    BENCHMARKS[options.what](options)


if __name__ == "__main__":
    run_script(main)
