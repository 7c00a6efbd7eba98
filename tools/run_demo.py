"""The whole method on the built-in benchmark: data set, five stages, all training modes, report.

    bash tools/demo.sh [--quick] [--seed N]

Jobs that do not wait for each other run side by side, one thread each. A job that finished is not
run again; one that was killed goes on where it was. Each job's output is in <run_dir>/logs/.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.jobs import Job, run_jobs
from core.run.errors import UserError, run_script
from core.run.files import user_path


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/demo.sh", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for a smoke test")
    parser.add_argument("--seed", type=int, default=0, help="of the data set and of every stage")
    parser.add_argument(
        "--run-dir", type=user_path, help="results; default runs/demo[_quick][_seedN]"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="side by side")
    options = parser.parse_args()
    name = "demo_quick" if options.quick else "demo"
    os.chdir(ROOT)  # where the jobs run, and relative folders start
    default = Path("runs") / (f"{name}_seed{options.seed}" if options.seed else name)
    run_dir = options.run_dir or default
    began = time.monotonic()
    settings = hashlib.sha256((ROOT / "configs" / f"{name}.yaml").read_bytes()).hexdigest()
    run_jobs(make_jobs(name, options.seed, run_dir), run_dir, settings, max(1, options.jobs))
    report = ["tools/make_report.py", *_settings(name, options.seed, run_dir), "--summary"]
    if subprocess.run([sys.executable, *report], cwd=ROOT).returncode:
        raise UserError("the report could not be made; all other results stand")
    print(f"\n{time.monotonic() - began:.0f} s in all; open {run_dir / 'report.html'}")


def _settings(name: str, seed: int, run_dir: Path) -> list[str]:
    data = Path("data") / f"{name}_seed{seed}"
    overrides = {"--run_dir": run_dir, "--seed": seed, "--data.root": data}
    return [f"--config=configs/{name}.yaml", *(f"{k}={v}" for k, v in overrides.items())]


def make_jobs(name: str, seed: int, run_dir: Path) -> list[Job]:
    """All commands of the demo, in an order in which each comes after those it reads from."""
    settings = _settings(name, seed, run_dir)
    sizes = ["--train=96", "--val=32"] if name == "demo_quick" else []
    labels_best = f"{run_dir}/wsss/labels_best"
    control = f"{run_dir}/control"

    def script(path: str, *arguments: str) -> list[str]:
        return [path, *settings, *arguments]

    def score(folder: str, label: str) -> list[str]:
        return script("evaluate.py", f"--predictions={folder}", "--split=train", f"--name={label}")

    dataset = [
        "tools/make_demo_dataset.py",
        f"--root=data/{name}_seed{seed}",
        f"--seed={seed}",
        *sizes,
    ]
    jobs = [
        Job("data set", dataset),
        Job("stage 2: classifier, pseudo labels", script("train_wsss.py"), ("data set",)),
        Job("stage 1: features", script("train_uss.py"), ("data set",)),
    ]
    wsss, uss = jobs[1].name, jobs[2].name
    debias, sweep = "stage 3: debiased labels", "baseline: best threshold"
    exported = "control: classifier features"
    controlled = "control: debiased with them"
    jobs += [
        Job(debias, script("make_debiased_labels.py"), (wsss, uss)),
        Job(sweep, script("tools/sweep_threshold.py"), (wsss,)),
    ]
    reads = {"wsss_best": sweep, "supervised": "data set"}
    for mode in ("supervised", "wsss_best", "mars", "complement", "ignore"):
        arguments = [f"--segmentation.mode={mode}"]
        if mode == "wsss_best":
            arguments = ["--segmentation.mode=wsss", "--segmentation.name=wsss_best"]
            arguments.append(f"--segmentation.labels_dir={labels_best}")
        train = Job(
            f"stage 4: {mode}",
            script("train_segmentation.py", *arguments),
            (reads.get(mode, debias),),
        )
        jobs += [train, Job(f"stage 5: {mode}", script("evaluate.py", *arguments), (train.name,))]
    features = [f"--uss.features_dir={control}/features", "--uss.centre=true"]
    jobs += [
        Job("scores: pseudo labels", score(f"{run_dir}/wsss/labels", "labels_wsss"), (wsss,)),
        Job("scores: best threshold", score(labels_best, "labels_wsss_best"), (sweep,)),
        Job(
            "scores: debiased labels", score(f"{run_dir}/debias/labels", "labels_debias"), (debias,)
        ),
        Job(
            exported,
            script(
                "tools/export_features.py", "--source=classifier", f"--output={control}/features"
            ),
            (wsss,),
        ),
        Job(
            controlled,
            script("make_debiased_labels.py", *features, f"--debias.output_dir={control}/debias"),
            (exported,),
        ),
        Job(
            "analysis",
            script("tools/analyse_bias.py", f"--control={control}/debias"),
            (debias, controlled),
        ),
    ]
    return jobs


if __name__ == "__main__":
    run_script(main)
