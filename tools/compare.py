"""The paper's Tables 4 and 5 in small, on the built-in benchmark.

    python tools/compare.py methods --seeds 20 21      # every WSSS method, without and with MARS
    python tools/compare.py features --seeds 20 21     # two of them, MARS with several features

For each data-set seed and each method: pseudo labels, debiased labels, a segmenter trained on
either, and one trained on ground truth. Prints a Markdown table and writes it to
<run-dir>/analysis/table5.json or table4.json. "Without" is plain training on the very labels that
MARS starts from. What was finished is not run again.
"""

import argparse
import hashlib
import os
import shlex
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.jobs import Job, run_jobs
from core.run.errors import run_script
from core.run.files import user_path
from tools.analyses import published
from tools.analyses.results import Analysis, publish, spread

METHODS = {
    "cam": "CAM",
    "irn": "IRNet",
    "advcam": "AdvCAM",
    "seam": "SEAM",
    "rsepm": "RS+EPM, ours",
}
FEATURES = {
    "demo": "self-supervised ViT (the demo's)",
    "stego": "STEGO on it",
    "leopart": "Leopart on it",
    "classifier": "control: the method's own classifier",
    "random": "control: the same ViT, random weights",
}
LABELS = ("labels_wsss", "labels_debias")
MODES = ("wsss", "mars")
CAPTION = (
    "mIoU on the built-in benchmark, per cent; of several data-set seeds the mean "
    "(lowest .. highest). Of labels on the training list, of segmenters on the validation list. "
    "The settings of each method were chosen on seed 0."
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=["methods", "features"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all, or cam rsepm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the data sets")
    parser.add_argument("--run-dir", type=user_path, default=Path("runs/methods"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="side by side")
    parser.add_argument(
        "--output", type=user_path, nargs="+", help="write the table to these folders instead"
    )
    options = parser.parse_args()
    default = [*METHODS] if options.table == "methods" else ["cam", "rsepm"]
    methods, run_dir = options.methods or default, options.run_dir
    os.chdir(ROOT)  # where the jobs run, and relative folders start
    files = sorted((ROOT / "configs").glob("demo*.yaml"))
    settings = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
    for seed in options.seeds:
        jobs = make_jobs(methods, seed, run_dir)
        if options.table == "features":
            jobs += feature_jobs(methods, seed, run_dir)
        run_jobs(jobs, run_dir / f"seed{seed}", settings, max(1, options.jobs))
    make = method_table if options.table == "methods" else feature_table
    table = make(run_dir, methods, options.seeds)
    command = f"python tools/compare.py {shlex.join(sys.argv[1:])}"
    publish(options.output or [run_dir / "analysis"], table, command)


def overrides(names: list[str], seed: int, run_dir: Path, **further: object) -> list[str]:
    """Arguments of a script: configuration files, and what differs from them."""
    values = {"run_dir": run_dir, "seed": seed, "data.root": f"data/demo_seed{seed}", **further}
    files = [f"--config=configs/{name}.yaml" for name in ("demo", *names)]
    return [*files, *(f"--{key}={value}" for key, value in values.items())]


def settings_of(method: str, seed: int, run_dir: Path) -> list[str]:
    """Those of one method's stages."""
    names = [] if method == "cam" else [f"demo_{method}"]
    further = {"segmentation.mode": "wsss"}
    return overrides(names, seed, run_dir / f"seed{seed}" / method, **further)


def make_jobs(methods: list[str], seed: int, run_dir: Path) -> list[Job]:
    """All commands of one seed."""
    data = f"data/demo_seed{seed}"
    drawn = "data set"
    jobs = [Job(drawn, ["tools/make_demo_dataset.py", f"--root={data}", f"--seed={seed}"])]

    def add(method: str, stage: str, script: str, arguments: list[str], after: str) -> str:
        name = f"{method}: {stage}"
        names = (after,) if after == drawn else (f"{method}: {after}",)
        jobs.append(Job(name, [script, *settings_of(method, seed, run_dir), *arguments], names))
        return stage

    def train(method: str, mode: str, after: str) -> None:
        chosen = [f"--segmentation.mode={mode}"]
        done = add(method, f"train {mode}", "train_segmentation.py", chosen, after)
        add(method, f"score {mode}", "evaluate.py", chosen, done)

    train("cam", "supervised", drawn)
    for method in methods:
        folder = run_dir / f"seed{seed}" / method
        add(method, "features", "train_uss.py", [], drawn)
        add(method, "pseudo labels", "train_wsss.py", [], drawn)
        names = (f"{method}: features", f"{method}: pseudo labels")
        debiased = f"{method}: debiased labels"
        jobs.append(
            Job(debiased, ["make_debiased_labels.py", *settings_of(method, seed, run_dir)], names)
        )
        for name, part, after in zip(
            LABELS, ("wsss", "debias"), ("pseudo labels", "debiased labels"), strict=True
        ):
            labels = [f"--predictions={folder}/{part}/labels", "--split=train", f"--name={name}"]
            add(method, f"score of {after}", "evaluate.py", labels, after)
        for mode, after in zip(MODES, ("pseudo labels", "debiased labels"), strict=True):
            train(method, mode, after)
    return jobs


def feature_jobs(methods: list[str], seed: int, run_dir: Path) -> list[Job]:
    """MARS on each method's labels with each kind of features but the demo's, which `make_jobs`
    has."""
    jobs = []
    for method in methods:
        base = run_dir / f"seed{seed}" / method
        for kind in [k for k in FEATURES if k != "demo"]:
            further = {"wsss.labels_dir": base / "wsss/labels"}
            if kind == "classifier":
                further["uss.features_dir"] = base / "classifier_features"
            if kind == "random":
                further["uss.backbone.weights"] = "none"
            names = [f"demo_{kind}"] if kind in ("stego", "leopart") else []
            folder = run_dir / f"seed{seed}" / f"{method}_{kind}"
            settings = overrides(names, seed, folder, **further)
            name, labels = f"{method}, {kind}", f"{method}: pseudo labels"
            export = ["--source=classifier", f"--output={base / 'classifier_features'}"]
            first = ["train_uss.py", *settings]
            if kind == "classifier":
                own = settings_of(method, seed, run_dir)
                first = ["tools/export_features.py", *own, *export]
            score = [f"--predictions={folder}/debias/labels", "--split=train"]
            jobs += [
                Job(f"{name}: features", first, (labels,)),
                Job(
                    f"{name}: debias",
                    ["make_debiased_labels.py", *settings],
                    (f"{name}: features",),
                ),
                Job(
                    f"{name}: score of labels",
                    ["evaluate.py", *settings, *score, "--name=labels_debias"],
                    (f"{name}: debias",),
                ),
                Job(f"{name}: train", ["train_segmentation.py", *settings], (f"{name}: debias",)),
                Job(f"{name}: score", ["evaluate.py", *settings], (f"{name}: train",)),
            ]
    return jobs


def miou(run_dir: Path, seeds: list[int], folder: str, name: str) -> np.ndarray:
    """One score in per cent for each seed."""
    return published.miou([run_dir / f"seed{seed}" / folder for seed in seeds], name)


def method_table(run_dir: Path, methods: list[str], seeds: list[int]) -> Analysis:
    """Mean over the seeds (lowest .. highest), in per cent."""
    full = miou(run_dir, seeds, "cam", "supervised")
    columns = ["labels of", "pseudo labels", "debiased, biased = background"]
    columns += ["without MARS", "with MARS", "gain", "gap closed, %"]
    rows = []
    for method in methods:
        labels, (base, mars) = (
            [miou(run_dir, seeds, method, name) for name in names] for names in (LABELS, MODES)
        )
        cells = map(spread, [*labels, base, mars, mars - base])
        rows.append([METHODS[method], *cells, published.closed_gap(base, mars, full)])
    rows.append(["ground truth", "", "", spread(full), "", "", ""])
    caption = f"{CAPTION} Seeds {', '.join(map(str, seeds))}."
    return Analysis("table5", 50, "Table 5 in small: every method", caption, columns, rows)


def feature_table(run_dir: Path, methods: list[str], seeds: list[int]) -> Analysis:
    """The same for the kinds of features."""
    full = miou(run_dir, seeds, "cam", "supervised")
    columns = ["labels of", "features", "debiased, biased = background", "mIoU"]
    columns += ["gain", "gap closed, %"]
    rows = []
    for method in methods:
        base = miou(run_dir, seeds, method, "wsss")
        plain = miou(run_dir, seeds, method, "labels_wsss")
        name = METHODS[method]
        rows.append([name, "none: without MARS", spread(plain), spread(base), "", ""])
        for kind, title in FEATURES.items():
            folder = method if kind == "demo" else f"{method}_{kind}"
            labels, mars = (miou(run_dir, seeds, folder, n) for n in ("labels_debias", "mars"))
            cells = map(spread, [labels, mars, mars - base])
            rows.append([name, title, *cells, published.closed_gap(base, mars, full)])
    caption = f"{CAPTION} Seeds {', '.join(map(str, seeds))}."
    return Analysis("table4", 40, "Table 4 in small: features", caption, columns, rows)


if __name__ == "__main__":
    run_script(main)
