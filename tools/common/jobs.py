"""Commands that depend on each other: run in parallel, one thread each, and resumed."""

import ctypes
import hashlib
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from core.config import Config
from core.run import vision
from core.run.errors import UserError
from core.run.files import read_json, write_json
from tools.common import ROOT

PROCESSES = get_context("fork" if sys.platform == "linux" else "spawn")
"""Forked processes share what is imported, which saves seconds each; only Linux's are safe."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
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
    running: dict[str, tuple[Job, BaseProcess, float]] = {}
    began = time.monotonic()
    try:
        while waiting or running:
            for job in [j for j in waiting if ended.issuperset(j.depends_on)]:
                if len(running) < max(1, max_parallel):
                    waiting.remove(job)
                    running[job.name] = (job, _start(job, _log(folder, job)), time.monotonic())
            time.sleep(0.1)
            for job, process, started in [*running.values()]:
                if process.is_alive():
                    continue
                del running[job.name]
                if process.exitcode:
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
            process.join()


def _log(folder: Path, job: Job) -> Path:
    return folder / "logs" / f"{job.name.replace(': ', '_').replace(' ', '_')}.log"


def _start(job: Job, path: Path) -> BaseProcess:
    path.parent.mkdir(parents=True, exist_ok=True)
    if PROCESSES.get_start_method() == "fork":
        vision.timm, vision.v2  # noqa: B018 (nearly every script needs them: imported once)
    process = PROCESSES.Process(target=_run, args=(job.command, path))
    process.start()
    return process


def _run(command: list[str], path: Path) -> None:
    """In a process of its own: what `python <command>` does, with one thread and its output in a
    log."""
    if sys.platform == "linux":
        _end_with_parent()
    with path.open("ab", buffering=0) as log, Path(os.devnull).open("rb") as nothing:
        log.write(f"{CALL}{shlex.join(command)}\n".encode())  # earlier calls are above it
        for file, descriptor in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(file.fileno(), descriptor)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", 1), open(2, "w", 1)  # noqa: SIM115
    os.environ |= dict.fromkeys(THREADS, "1")
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.argv = [*command]
    runpy.run_path(command[0], run_name="__main__")


def _end_with_parent() -> None:
    """Makes the kernel kill this job when its parent is killed, so that none is left behind."""
    parent_death = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(parent_death, signal.SIGKILL)


def _tail(log: Path) -> str:
    text = log.read_text("utf-8", "replace").rpartition(CALL)[2].partition("\n")[2]
    lines = text.replace("\r", "\n").strip().splitlines()
    return "\n".join(f"  {line}" for line in lines[-6:])


def call(script: str, *arguments: Any, quiet: bool = False) -> None:
    """Runs one of the repository's scripts, with its output on the screen; if `quiet`, only its
    progress, warnings and errors.

    Raises:
        UserError: it failed, and has said why.
    """
    sys.stdout.flush()
    command = [sys.executable, script, *map(str, arguments)]
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL if quiet else None).returncode:
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
