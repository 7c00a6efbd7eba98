"""Every WSSS method on the built-in benchmark, without and with MARS: the paper's Table 5 in small.

    python tools/compare_methods.py --seeds 20 21

For each data-set seed and each method: pseudo labels, debiased labels, a segmenter trained on
either, and one trained on ground truth. Prints a Markdown table. "Without" is plain training on the
very labels that MARS starts from. What was finished is not run again.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.errors import run_script
from core.files import read_json
from core.jobs import Job, run_jobs

METHODS = {
    "cam": "CAM",
    "irn": "IRNet",
    "advcam": "AdvCAM",
    "seam": "SEAM",
    "rsepm": "RS+EPM, ours",
}
LABELS = ("labels_wsss", "labels_debias")
MODES = ("wsss", "mars")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the data sets")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/methods"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="side by side")
    options = parser.parse_args()
    for seed in options.seeds:
        jobs = [job for job in make_jobs(options.methods, seed, options.run_dir)]
        files = sorted((ROOT / "configs").glob("demo*.yaml"))
        settings = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
        run_jobs(jobs, options.run_dir / f"seed{seed}", settings, max(1, options.jobs))
    print(f"\nseeds {', '.join(map(str, options.seeds))}\n")
    print(table(options.run_dir, options.methods, options.seeds))


def make_jobs(methods: list[str], seed: int, run_dir: Path) -> list[Job]:
    """All commands of one seed."""
    data = f"data/demo_seed{seed}"

    def settings(method: str) -> list[str]:
        files = ["demo"] if method == "cam" else ["demo", f"demo_{method}"]
        folder = run_dir / f"seed{seed}" / method
        values = {"run_dir": folder, "seed": seed, "data.root": data}
        values |= {"segmentation.mode": "wsss"}
        return [
            *(f"--config=configs/{name}.yaml" for name in files),
            *(f"--{key}={value}" for key, value in values.items()),
        ]

    drawn = "data set"
    jobs = [Job(drawn, ["tools/make_demo_dataset.py", f"--root={data}", f"--seed={seed}"])]

    def add(method: str, stage: str, script: str, arguments: list[str], after: str) -> str:
        name = f"{method}: {stage}"
        names = (after,) if after == drawn else (f"{method}: {after}",)
        jobs.append(Job(name, [script, *settings(method), *arguments], names))
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
        jobs.append(Job(debiased, ["make_debiased_labels.py", *settings(method)], names))
        for name, part, after in zip(
            LABELS, ("wsss", "debias"), ("pseudo labels", "debiased labels"), strict=True
        ):
            labels = [f"--predictions={folder}/{part}/labels", "--split=train", f"--name={name}"]
            add(method, f"score of {after}", "evaluate.py", labels, after)
        for mode, after in zip(MODES, ("pseudo labels", "debiased labels"), strict=True):
            train(method, mode, after)
    return jobs


def table(run_dir: Path, methods: list[str], seeds: list[int]) -> str:
    """Mean over the seeds (lowest .. highest), in per cent."""

    def miou(method: str, name: str) -> np.ndarray:
        scores = (run_dir / f"seed{s}" / method / "evaluation" / name for s in seeds)
        return 100 * np.array([read_json(path / "scores.json")["miou"] for path in scores])

    full = miou("cam", "supervised")
    lines = [
        "| labels of | pseudo labels | debiased, biased = background | without MARS | with MARS "
        "| gain | gap closed |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        labels, (base, mars) = ([miou(method, name) for name in names] for names in (LABELS, MODES))
        closed = 100 * (mars - base) / (full - base)
        cells = [*labels, base, mars, mars - base, closed]
        lines.append(f"| {METHODS[method]} | " + " | ".join(map(spread, cells)) + " % |")
    lines.append(f"| ground truth | | | {spread(full)} | | | |")
    return "\n".join(lines)


def spread(values: np.ndarray) -> str:
    return f"{values.mean():.1f} ({values.min():.1f} .. {values.max():.1f})"


if __name__ == "__main__":
    run_script(main)
