"""Commands that depend on each other: run in parallel, one thread each, and resumed."""

import ctypes
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.config import Config
from core.run.errors import UserError
from core.run.files import read_json, write_json
from tools.common import ROOT

CALL = "\n$ python "
"""What stands in a log before the arguments of a call."""


@dataclass
class Job:
    """One of the repository's scripts with its arguments, and the jobs whose results it reads."""

    name: str
    command: list[str]
    depends_on: tuple[str, ...] = ()


def run_jobs(jobs: Sequence[Job], folder: Path, settings: str, max_parallel: int) -> None:
    """Runs every unfinished job as soon as the jobs that it depends on have ended.

    Args:
        jobs: jobs in an order in which each follows those it depends on.
        folder: folder that gets `jobs.json`, the finished jobs, and `logs/`, the jobs' output.
        settings: whatever else the results depend on, such as the hash of a configuration.
        max_parallel: number of jobs at a time, at least 1.

    Raises:
        UserError: a job failed; the other running jobs are stopped, and continue with the next
            call.
    """
    names = {job.name for job in jobs}
    for job in jobs:
        if not names.issuperset(job.depends_on):
            raise ValueError(f"{job.name} depends on {set(job.depends_on) - names}: no such job")
    record = folder / "jobs.json"
    done = read_json(record) if record.exists() else {}
    ended: set[str] = set()
    for job in jobs:  # finished with the same command and settings
        if done.get(job.name) == job.command + [settings] and ended.issuperset(job.depends_on):
            ended.add(job.name)
    waiting = [job for job in jobs if job.name not in ended]
    running: dict[str, tuple[Job, subprocess.Popen, float]] = {}
    began = time.monotonic()
    try:
        while waiting or running:
            for job in [j for j in waiting if ended.issuperset(j.depends_on)]:
                if len(running) < max(1, max_parallel):
                    waiting.remove(job)
                    running[job.name] = (job, _start(job, _log(folder, job)), time.monotonic())
            time.sleep(0.1)
            for job, process, started in [*running.values()]:
                if process.poll() is None:
                    continue
                del running[job.name]
                if process.returncode:
                    log = _log(folder, job)
                    raise UserError(f"{job.name} failed:\n{_tail(log)}\n(full log: {log})")
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
        log.write(f"{CALL}{shlex.join(job.command)}\n".encode())  # earlier calls are above it
        log.flush()
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
    """Makes the kernel kill this job when its parent is killed, so that none is left behind."""
    parent_death = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(parent_death, signal.SIGKILL)


def _tail(log: Path) -> str:
    text = log.read_text("utf-8", "replace").rpartition(CALL)[2].partition("\n")[2]
    lines = text.replace("\r", "\n").strip().splitlines()
    return "\n".join(f"  {line}" for line in lines[-6:])


def call(script: str, *arguments: Any) -> None:
    """Runs one of the repository's scripts, with its output on the screen.

    Raises:
        UserError: it failed, and has said why.
    """
    sys.stdout.flush()
    if subprocess.run([sys.executable, script, *map(str, arguments)], cwd=ROOT).returncode:
        raise UserError(f"{script} stopped, see above; the same command continues from there")


def digest_of_configs(pattern: str) -> str:
    """SHA-256 of the configuration files that match a pattern below configs/."""
    files = sorted((ROOT / "configs").glob(pattern))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def digest_of_run(config: Config, stage: Path) -> str:
    """SHA-256 of a configuration and of the inputs of a finished stage.

    Args:
        config: configuration of the run.
        stage: folder of the stage, with its manifest.json.
    """
    state = [asdict(config), read_json(stage / "manifest.json")["inputs"]]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
