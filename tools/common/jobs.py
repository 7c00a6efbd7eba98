"""Commands that wait for each other: side by side, one thread each, taken up where they were."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.run.errors import UserError
from core.run.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Job:
    """One of the repository's scripts with its arguments, and the jobs whose results it reads."""

    name: str
    command: list[str]
    depends_on: tuple[str, ...] = ()


def run_jobs(jobs: Sequence[Job], folder: Path, settings: str, max_parallel: int) -> None:
    """Runs every job not done yet as soon as those before it have ended.

    Args:
        jobs: in an order in which each comes after those it reads from.
        folder: gets `jobs.json`, what was done, and `logs/`, the output of each job.
        settings: whatever else the results depend on, such as the hash of a configuration.
        max_parallel: how many at a time.

    Raises:
        UserError: a job failed; the others in progress are stopped and go on with the next call.
    """
    names = {job.name for job in jobs}
    for job in jobs:
        if not names.issuperset(job.depends_on):
            raise ValueError(f"{job.name} waits for {set(job.depends_on) - names}, which is no job")
    record = folder / "jobs.json"
    done = read_json(record) if record.exists() else {}
    ended: set[str] = set()
    for job in jobs:  # done with the same command and settings, on results that still stand
        if done.get(job.name) == job.command + [settings] and ended.issuperset(job.depends_on):
            ended.add(job.name)
    waiting = [job for job in jobs if job.name not in ended]
    running: dict[str, tuple[Job, subprocess.Popen, float]] = {}
    began = time.monotonic()
    try:
        while waiting or running:
            for job in [j for j in waiting if ended.issuperset(j.depends_on)]:
                if len(running) < max_parallel:
                    waiting.remove(job)
                    running[job.name] = (job, _start(job, _log(folder, job)), time.monotonic())
            time.sleep(0.1)
            for job, process, started in [*running.values()]:
                if process.poll() is None:
                    continue
                del running[job.name]
                if process.returncode:
                    log = _log(folder, job)
                    raise UserError(f"{job.name} failed:\n{_tail(log)}\n(all of it: {log})")
                ended.add(job.name)
                done[job.name] = job.command + [settings]
                write_json(record, done)
                now = time.monotonic()
                print(f"[{now - began:4.0f} s] {job.name} ({now - started:.0f} s)", flush=True)
    finally:
        for _, process, _ in running.values():
            process.terminate()
            process.wait()


def _log(folder: Path, job: Job) -> Path:
    return folder / "logs" / f"{job.name.replace(': ', '_').replace(' ', '_')}.log"


def _start(job: Job, path: Path) -> subprocess.Popen:
    path.parent.mkdir(parents=True, exist_ok=True)
    threads = {k: "1" for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    with path.open("ab") as log:
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
