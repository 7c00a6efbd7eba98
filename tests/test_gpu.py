"""The stages on a GPU: each trains, goes on after a kill, and labels as the CPU does.

tools/gpu_check.sh runs them; MARS_TEST_DEVICE=cpu tries the tests themselves without a GPU.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, run_python, tiny_config
from cv2 import imread, resize

from core.crf.dense import DenseCRF
from core.data.labels import read_label
from core.run import checkpoint

DEVICE = os.environ.get("MARS_TEST_DEVICE", "cuda")
AGREEMENT = 0.99  # of all pixels; a GPU rounds factors of a convolution to TF32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE != "cpu" and not torch.cuda.is_available(),
        reason="needs a GPU (MARS_TEST_DEVICE=cpu tries the tests without one)",
    ),
]


def options(experiment: Path, run: Path, *settings: str, device: str = DEVICE) -> tuple[str, ...]:
    return (f"--config={experiment}", f"--run_dir={run}", f"--device={device}", *settings)


def call(script: str, *arguments: str) -> None:
    """Runs a script in a process of its own: CUDA does not survive a fork."""
    done = run_python(script, *arguments, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def experiment(tiny_data, tmp_path_factory) -> Path:
    """A configuration file; beside it, `cpu` is the run folder of stages 1 to 5 on the CPU."""
    path = tmp_path_factory.mktemp("gpu") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tiny_data, path.with_name("run"))))
    scripts = ("train_uss", "train_wsss", "make_debiased_labels", "train_segmentation", "evaluate")
    for script in scripts:
        call(f"{script}.py", *options(path, path.with_name("cpu"), device="cpu"))
    return path


def forget(stage: Path) -> None:
    """Removes all results of a finished stage, but not what it has trained."""
    for path in stage.iterdir():
        if path.name in ("cams", "seeds", "labels", "clusters", "predictions"):
            shutil.rmtree(path)
    (stage / "centroids.npz").unlink(missing_ok=True)
    manifest = stage / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"finished": true', '"finished": false'))


def agreement(ours: Path, theirs: Path) -> float:
    """Share of pixels with the same label in two folders, which hold more than one."""
    names = sorted(path.name for path in theirs.glob("*.png"))
    assert names and names == sorted(path.name for path in ours.glob("*.png"))
    a, b = (np.stack([read_label(folder / name) for name in names]) for folder in (ours, theirs))
    assert len(np.unique(b)) > 1
    return (a == b).mean()


TRAININGS = {
    "self-supervision": ("train_uss.py", "uss/self_supervised", "--uss.method=frozen"),
    "stego": ("train_uss.py", "uss/stego", "--uss.iterations=40"),
    "leopart": ("train_uss.py", "uss/leopart", "--uss.method=leopart", "--uss.leopart.epochs=10"),
    **{
        method: ("train_wsss.py", "wsss", f"--wsss.method={method}", "--wsss.epochs=10")
        for method in ("cam", "irn", "advcam", "seam", "rsepm")
    },
    "deeplab": ("train_segmentation.py", "segmentation/mars", "--segmentation.epochs=10"),
}
SELF_SUPERVISED = {"iterations": 40, "batch_size": 4, "prototypes": 8}
SELF_SUPERVISED |= {"teacher_size": 64, "student_size": 32}


@pytest.mark.parametrize("name", TRAININGS)
def test_killed_training_goes_on_where_it_was(experiment, tmp_path, name):
    """In the precision that a user gets; the log, which checkpoints carry, is marked in between."""
    script, folder, *settings = TRAININGS[name]
    if name == "self-supervision":
        settings += [f"--uss.self_supervised.{key}={v}" for key, v in SELF_SUPERVISED.items()]
    run, upstream = tmp_path / "run", ("uss", "wsss", "debias") if name == "deeplab" else ()
    for stage in upstream:
        shutil.copytree(experiment.with_name("cpu") / stage, run / stage)
    arguments = options(experiment, run, *settings, "--precision=auto")
    path, quiet = run / folder / "checkpoint.pth", subprocess.DEVNULL
    command = [sys.executable, script, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=quiet, stderr=quiet)
    while process.poll() is None and not path.exists():
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    state = checkpoint.resume(path)
    assert 0 < state["iteration"] < 40
    mark = {"iteration": 0, "marked": True}
    checkpoint.save(path, state | {"log": json.dumps([mark, *json.loads(state["log"])])})
    call(script, *arguments)
    log = [json.loads(line) for line in path.with_name("log.jsonl").read_text().splitlines()]
    assert log[0] == mark and [entry["iteration"] for entry in log] == [*range(41)]


@pytest.mark.parametrize("method", ["cam", "irn", "advcam", "seam", "rsepm"])
def test_pseudo_labels_agree(experiment, tmp_path, method):
    settings = f"--wsss.method={method}"
    call("train_wsss.py", *options(experiment, tmp_path / "cpu", settings, device="cpu"))
    shutil.copytree(tmp_path / "cpu", tmp_path / "ours")
    forget(tmp_path / "ours/wsss")
    call("train_wsss.py", *options(experiment, tmp_path / "ours", settings))
    assert agreement(tmp_path / "ours/wsss/labels", tmp_path / "cpu/wsss/labels") >= AGREEMENT


@pytest.mark.parametrize(
    ("script", "stage", "results"),
    [
        ("make_debiased_labels.py", "debias", "labels"),
        ("evaluate.py", "evaluation/mars", "predictions"),
    ],
)
def test_later_labels_agree(experiment, tmp_path, script, stage, results):
    theirs, ours = experiment.with_name("cpu"), tmp_path / "ours"
    shutil.copytree(theirs, ours)
    forget(ours / stage)
    call(script, *options(experiment, ours))
    assert agreement(ours / stage / results, theirs / stage / results) >= AGREEMENT


@pytest.mark.parametrize("labels", [2, 5])
def test_dense_crf_agrees(tiny_data, labels):
    image = imread(next((tiny_data / "JPEGImages").iterdir()))
    probs = np.random.default_rng(0).dirichlet(np.ones(labels), (8, 8)).astype(np.float32)
    probs = resize(probs, image.shape[1::-1]).transpose(2, 0, 1)
    ours, theirs = (crf(image, probs) for crf in (DenseCRF("torch", DEVICE), DenseCRF("numba")))
    assert (ours.argmax(0) == theirs.argmax(0)).mean() >= 0.999


STARVE = {
    "cuda": "torch.cuda.set_per_process_memory_fraction(1e-6)",
    "cpu": "torch.nn.Module.to = lambda *_, **__: torch.empty(2**60)",
}
START = "; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.mark.parametrize("script", ["train_uss.py", "train_wsss.py"])
def test_too_little_memory_is_one_message(experiment, tmp_path, script):
    body = f"import runpy, sys, torch; {STARVE[DEVICE]}{START}"
    done = run_python("-c", body, script, *options(experiment, tmp_path / "run"), cwd=ROOT)
    assert done.returncode == 1 and "error: out of memory. Lower the batch size" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1
