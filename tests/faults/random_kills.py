"""Kills every stage at random moments, again and again, and compares with an uninterrupted run.

    python tests/faults/random_kills.py --kills 200 [--seed 0]

Runs all stages on a tiny data set, once without interruption and then in rounds: each stage is
started and killed (SIGKILL, its processes with it) after a random share of the time that it needs,
until three kills have hit it, and then ends in peace. After each round every label, prediction and
score must be equal to the first run's, byte for byte, and nothing unfinished may be left. Prints
one line per round; ends with status 1 at the first difference.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml
from conftest import ROOT, tiny_config

KILLS = 3  # of a stage in each round
STAGES = {
    "uss": ("train_uss.py",),
    "wsss": ("train_wsss.py", "--wsss.method=irn"),
    "debias": ("make_debiased_labels.py", "--wsss.method=irn"),
    "segmentation": ("train_segmentation.py", "--wsss.method=irn"),
    "evaluation": ("evaluate.py", "--wsss.method=irn"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, killed = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sizes = ("--train", "16", "--val", "6", "--seed", "3", "--workers", "1")
        command = [
            sys.executable,
            "tools/data/make_demo_dataset.py",
            "--root",
            str(folder / "data"),
            *sizes,
        ]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        times = {}
        for stage in STAGES:
            began = time.monotonic()
            process = start(stage, folder, "whole")
            if process.wait():
                sys.exit(f"{stage} failed: {log(folder, 'whole', stage)}")
            times[stage] = time.monotonic() - began
        whole = digests(folder / "whole")
        print(f"uninterrupted: {len(whole)} files, {sum(times.values()):.0f} s", flush=True)
        number = 0
        while killed < options.kills:
            number += 1
            run = f"round{number}"
            hits = {stage: kill_and_finish(stage, folder, run, times, rng) for stage in STAGES}
            killed += sum(hits.values())
            compare(whole, folder / run)
            told = ", ".join(f"{stage} {count}" for stage, count in hits.items())
            print(f"{run}: killed {told}; {killed} in all, everything equal", flush=True)


def settings(folder: Path, run: str) -> Path:
    """The configuration of a run: more checkpoints and images than steps of a moment."""
    path = folder / f"{run}.yaml"
    content = tiny_config(folder / "data", folder / run)
    content["checkpoint_every"] = 1
    content["uss"]["iterations"] = 8
    path.write_text(yaml.safe_dump(content))
    return path


def start(stage: str, folder: Path, run: str) -> subprocess.Popen:
    """One stage in a process group of its own."""
    script, *options = STAGES[stage]
    command = [sys.executable, script, "--config", str(settings(folder, run)), *options]
    with (folder / f"{run}_{stage}.log").open("a") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def kill_and_finish(
    stage: str, folder: Path, run: str, times: dict[str, float], rng: random.Random
) -> int:
    """Runs a stage to its end with up to `KILLS` kills on the way; returns how many hit it."""
    hits = 0
    while hits < KILLS:
        process = start(stage, folder, run)
        try:
            process.wait(rng.uniform(0.3, 1) * times[stage])
            break  # it was faster
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            hits += 1
    if start(stage, folder, run).wait():
        sys.exit(f"{stage} failed after {hits} kills: {log(folder, run, stage)}")
    return hits


def log(folder: Path, run: str, stage: str) -> str:
    return (folder / f"{run}_{stage}.log").read_text()[-2000:]


def digests(folder: Path) -> dict[str, str]:
    """Of everything that must not depend on interruptions."""
    patterns = ("*/labels/*.png", "**/predictions/*.png", "**/scores.json", "debias/centroids.npz")
    paths = [p for pattern in patterns for p in folder.glob(pattern)]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def compare(whole: dict[str, str], folder: Path) -> None:
    found = digests(folder)
    differ = sorted(k for k in {*whole, *found} if whole.get(k) != found.get(k))
    if differ:
        sys.exit(f"{len(differ)} files of {folder.name} differ, first: {differ[0]}")
    left = [p for p in folder.rglob(".*.part")]
    if left:
        sys.exit(f"{folder.name} holds an unfinished file: {left[0]}")


if __name__ == "__main__":
    main()
