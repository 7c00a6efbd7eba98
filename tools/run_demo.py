"""The whole method on the built-in benchmark: data set, five stages, all training modes, report.

    bash tools/demo.sh [--quick] [--seed N]

Jobs that do not wait for each other run side by side, one thread each. A job that finished is not
run again; one that was killed goes on where it was. Each job's output is in <run_dir>/logs/.
"""

import argparse
import ctypes
import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.errors import UserError, run_script
from core.files import read_json, write_json


@dataclass
class Job:
    """One command, and the jobs whose results it reads."""

    name: str
    command: list[str]
    after: tuple[str, ...] = ()
    log: Path = field(default_factory=Path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/demo.sh", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for a smoke test")
    parser.add_argument("--seed", type=int, default=0, help="of the data set and of every stage")
    parser.add_argument("--run-dir", type=Path, help="results; default runs/demo[_quick][_seedN]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="side by side")
    options = parser.parse_args()
    name = "demo_quick" if options.quick else "demo"
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
    for job in jobs:
        job.log = run_dir / "logs" / f"{job.name.replace(': ', '_').replace(' ', '_')}.log"
    return jobs


def run_jobs(jobs: list[Job], run_dir: Path, settings: str, side_by_side: int) -> None:
    """Runs every job not done yet as soon as those before it have ended.

    Raises:
        UserError: a job failed; the others in progress are stopped and go on with the next call.
    """
    record = run_dir / "demo.json"
    done = read_json(record) if record.exists() else {}
    ended: set[str] = set()
    for (
        job
    ) in jobs:  # what was done with the same command and settings, on results that still stand
        if done.get(job.name) == job.command + [settings] and ended.issuperset(job.after):
            ended.add(job.name)
    waiting = [job for job in jobs if job.name not in ended]
    running: dict[str, tuple[Job, subprocess.Popen, float]] = {}
    began = time.monotonic()
    try:
        while waiting or running:
            for job in [j for j in waiting if ended.issuperset(j.after)]:
                if len(running) < side_by_side:
                    waiting.remove(job)
                    running[job.name] = (job, _start(job), time.monotonic())
            time.sleep(0.1)
            for job, process, started in [*running.values()]:
                if process.poll() is None:
                    continue
                del running[job.name]
                if process.returncode:
                    raise UserError(f"{job.name} failed:\n{_tail(job.log)}\n(all of it: {job.log})")
                ended.add(job.name)
                done[job.name] = job.command + [settings]
                write_json(record, done)
                now = time.monotonic()
                print(f"[{now - began:4.0f} s] {job.name} ({now - started:.0f} s)", flush=True)
    finally:
        for _, process, _ in running.values():
            process.terminate()
            process.wait()


def _start(job: Job) -> subprocess.Popen:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    threads = {k: "1" for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    with job.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *job.command],
            cwd=ROOT,
            env={**os.environ, **threads, "PYTHONUNBUFFERED": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )


def _end_with_parent() -> None:
    """Has the kernel end this job when the demo is killed, so that none is left behind."""
    parent_death = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(parent_death, signal.SIGKILL)


def _tail(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").replace("\r", "\n").strip().splitlines()
    return "\n".join(f"  {line}" for line in lines[-6:])


if __name__ == "__main__":
    run_script(main)
