"""Small versions of the paper's Tables 4 and 5, on the built-in benchmark.

    python tools/demo/compare.py methods --seeds 20 21     # WSSS methods, without and with MARS
    python tools/demo/compare.py features --seeds 20 21    # CAM and RS+EPM, several features

For each data-set seed and each method: pseudo labels, debiased labels, a segmenter trained on each,
and one trained on ground truth. WSSS is plain training on the labels that MARS starts
from. Prints a Markdown table and writes it to <run-dir>/analysis/table5.json or table4.json.
Finished jobs are not run again.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.run.errors import run_script
from core.run.files import user_path
from tools.common import ROOT, tool_parser
from tools.common.jobs import Job, digest_of_configs, run_jobs
from tools.common.titles import FEATURES, LABELS, METHODS, MODES, RECONSTRUCTED
from tools.paper import published
from tools.paper.results import Analysis, publish, spread

KINDS = ("demo", "stego", "leopart", "classifier", "random")  # of features
SCORED = ("labels_wsss", "labels_debias")
TRAINED = ("wsss", "mars")
CAPTION = (
    "mIoU on the built-in benchmark, per cent: the mean over the data-set seeds "
    "(lowest .. highest). Labels are scored on the training list, segmenters on the validation "
    "list. The settings of each method were chosen on seed 0. STEGO and Leopart are trained on the "
    f"demo's ViT. {RECONSTRUCTED}"
)


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("table", choices=["methods", "features"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all, or cam rsepm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the data sets")
    parser.add_argument("--run-dir", type=user_path, default=Path("runs/methods"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="jobs at a time")
    parser.add_argument(
        "--output", type=user_path, nargs="+", help="folders that get the table instead"
    )
    options = parser.parse_args()
    default = [*METHODS] if options.table == "methods" else ["cam", "rsepm"]
    methods, run_dir = options.methods or default, options.run_dir
    os.chdir(ROOT)  # where the jobs run, and relative folders start
    settings = digest_of_configs("demo*.yaml")
    for seed in options.seeds:
        jobs = make_jobs(methods, seed, run_dir)
        if options.table == "features":
            jobs += feature_jobs(methods, seed, run_dir)
        run_jobs(jobs, run_dir / f"seed{seed}", settings, options.jobs)
    make = method_table if options.table == "methods" else feature_table
    table = make(run_dir, methods, options.seeds)
    command = f"python tools/demo/compare.py {shlex.join(sys.argv[1:])}"
    publish(options.output or [run_dir / "analysis"], table, command)


def overrides(names: list[str], seed: int, run_dir: Path, **further: object) -> list[str]:
    """Arguments of a script: configuration files and the settings that differ from them."""
    values = {"run_dir": run_dir, "seed": seed, "data.root": f"data/demo_seed{seed}", **further}
    files = [f"--config=configs/{name}.yaml" for name in ("demo", *names)]
    return [*files, *(f"--{key}={value}" for key, value in values.items())]


def settings_of(method: str, seed: int, run_dir: Path) -> list[str]:
    """Arguments of one method's stages."""
    names = [] if method == "cam" else [f"demo_{method}"]
    further = {"segmentation.mode": "wsss"}
    return overrides(names, seed, run_dir / f"seed{seed}" / method, **further)


def make_jobs(methods: list[str], seed: int, run_dir: Path) -> list[Job]:
    """All jobs of one seed with the demo's features."""
    data = f"data/demo_seed{seed}"
    drawn, labelled, debiased = "data set", "pseudo labels", "debiased labels"
    jobs = [Job(drawn, ["tools/data/make_demo_dataset.py", f"--root={data}", f"--seed={seed}"])]

    def add(method: str, stage: str, script: str, *arguments: str, after: Sequence[str]) -> None:
        names = tuple(a if a == drawn else f"{method}: {a}" for a in after)
        command = [script, *settings_of(method, seed, run_dir), *arguments]
        jobs.append(Job(f"{method}: {stage}", command, names))

    def train(method: str, mode: str, after: str) -> None:
        chosen = f"--segmentation.mode={mode}"
        add(method, f"train {mode}", "train_segmentation.py", chosen, after=[after])
        add(method, f"score {mode}", "evaluate.py", chosen, after=[f"train {mode}"])

    train("cam", "supervised", drawn)
    for method in methods:
        folder = run_dir / f"seed{seed}" / method
        add(method, "features", "train_uss.py", after=[drawn])
        add(method, labelled, "train_wsss.py", after=[drawn])
        add(method, debiased, "make_debiased_labels.py", after=["features", labelled])
        for name, labels, made in zip(
            SCORED, ("wsss", "debias"), (labelled, debiased), strict=True
        ):
            options = f"--predictions={folder}/{labels}/labels", "--split=train", f"--name={name}"
            add(method, f"score of {made}", "evaluate.py", *options, after=[made])
        train(method, "wsss", labelled)
        train(method, "mars", debiased)
    return jobs


def feature_jobs(methods: list[str], seed: int, run_dir: Path) -> list[Job]:
    """MARS on each method's labels with all features except the demo's (see `make_jobs`)."""
    jobs = []
    for method in methods:
        base = run_dir / f"seed{seed}" / method
        own = base / "classifier_features"
        for kind in KINDS[1:]:
            further = {"wsss.labels_dir": base / "wsss/labels"}
            if kind == "classifier":
                further["uss.features_dir"] = own
            if kind == "random":
                further["uss.backbone.weights"] = "none"
            configs = [f"demo_{kind}"] if kind in ("stego", "leopart") else []
            folder = run_dir / f"seed{seed}" / f"{method}_{kind}"
            settings = overrides(configs, seed, folder, **further)
            first = ["train_uss.py", *settings]
            if kind == "classifier":
                export = ["--source=classifier", f"--output={own}"]
                first = [
                    "tools/export_features.py",
                    *settings_of(method, seed, run_dir),
                    *export,
                ]
            name = f"{method}, {kind}"
            score = [f"--predictions={folder}/debias/labels", "--split=train"]
            score.append("--name=labels_debias")
            for stage, command, after in (
                ("features", first, f"{method}: pseudo labels"),
                ("debias", ["make_debiased_labels.py", *settings], f"{name}: features"),
                ("score of labels", ["evaluate.py", *settings, *score], f"{name}: debias"),
                ("train", ["train_segmentation.py", *settings], f"{name}: debias"),
                ("score", ["evaluate.py", *settings], f"{name}: train"),
            ):
                jobs.append(Job(f"{name}: {stage}", command, (after,)))
    return jobs


def miou(run_dir: Path, seeds: list[int], folder: str, name: str) -> np.ndarray:
    """(seeds,) one score, per cent."""
    return published.miou([run_dir / f"seed{seed}" / folder for seed in seeds], name)


def titles(table: dict[str, tuple[str, str]], names: Sequence[str]) -> list[str]:
    return [table[name][0] for name in names]


def method_table(run_dir: Path, methods: list[str], seeds: list[int]) -> Analysis:
    """The small version of Table 5."""
    full = miou(run_dir, seeds, "cam", "supervised")
    columns = ["labels of", *titles(LABELS, SCORED), *titles(MODES, TRAINED)]
    columns += ["gain", "gap closed, %"]
    rows = []
    for method in methods:
        labels, (base, mars) = (
            [miou(run_dir, seeds, method, name) for name in names] for names in (SCORED, TRAINED)
        )
        cells = map(spread, [*labels, base, mars, mars - base])
        rows.append([METHODS[method], *cells, published.closed_gap(base, mars, full)])
    rows.append(["ground truth", "", "", spread(full), "", "", ""])
    caption = f"{CAPTION} Seeds {', '.join(map(str, seeds))}."
    return Analysis("table5", 50, "Table 5, small version: every method", caption, columns, rows)


def feature_table(run_dir: Path, methods: list[str], seeds: list[int]) -> Analysis:
    """The small version of Table 4."""
    full = miou(run_dir, seeds, "cam", "supervised")
    columns = ["labels of", "features", *titles(LABELS, ["labels_debias"]), "mIoU"]
    columns += ["gain", "gap closed, %"]
    rows = []
    for method in methods:
        base = miou(run_dir, seeds, method, "wsss")
        plain = miou(run_dir, seeds, method, "labels_wsss")
        name = METHODS[method]
        rows.append([name, FEATURES["none"], spread(plain), spread(base), "", ""])
        for kind in KINDS:
            folder = method if kind == "demo" else f"{method}_{kind}"
            labels, mars = (miou(run_dir, seeds, folder, n) for n in ("labels_debias", "mars"))
            cells = map(spread, [labels, mars, mars - base])
            rows.append([name, FEATURES[kind], *cells, published.closed_gap(base, mars, full)])
    caption = f"{CAPTION} Seeds {', '.join(map(str, seeds))}."
    return Analysis("table4", 40, "Table 4, small version: features", caption, columns, rows)


if __name__ == "__main__":
    run_script(main)
