"""A tiny data set in VOC's layout, and a tiny experiment on it."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import pytest
import yaml
from samples import draw_coco, draw_voc

from core.run import log
from core.run.errors import run_script

os.environ["MARS_TRACEBACK"] = "1"  # a test that looks for a traceback finds unforeseen errors
ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT.parent / "shared" / "data"
CLASSES = ["boat", "train", "bird", "bottle", "car", "cat", "sheep", "plane"]


def sample(name: str) -> Path:
    """A folder of real sample data beside the clone; the test is skipped where there is none."""
    if not (SAMPLES / name).is_dir():
        pytest.skip(f"needs the sample data {SAMPLES / name}")
    return SAMPLES / name


def drawn_or_real(name: str, draw: Callable[[Path], Path]):
    """A fixture of a data set: the drawn one, and the real one where it lies beside the clone."""
    kinds = ["drawn", "real"] if (SAMPLES / name).is_dir() else ["drawn"]

    @pytest.fixture(scope="session", params=kinds, name=name)
    def folder(request, tmp_path_factory) -> Path:
        return SAMPLES / name if request.param == "real" else draw(tmp_path_factory.mktemp(name))

    return folder


voc_photos = drawn_or_real("voc_photos", draw_voc)
voc_masks = drawn_or_real("voc_masks", lambda folder: draw_voc(folder) / "SegmentationClass")
coco_sample = drawn_or_real("coco_sample", draw_coco)


def run_python(*arguments, **options) -> subprocess.CompletedProcess:
    """Runs one of the repository's scripts as a user would, without its imports if possible."""
    command = [*map(str, arguments)]
    if not options and command[0].endswith(".py"):
        return forked.run(*command)
    options = {"cwd": ROOT, "capture_output": True, "text": True} | options
    return subprocess.run([sys.executable, *command], **options)


def run_inside(script: str, *arguments) -> subprocess.CompletedProcess:
    """Like `run_python`, but in this process: much faster, where the start is not under test."""
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    argv, folder, code = sys.argv, Path.cwd(), 0
    sys.argv = [script, *map(str, arguments)]
    log.printed.clear()  # what an earlier call said
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_script(main)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
        os.chdir(folder)
    said = [stream.buffer.getvalue().decode() for stream in (out, err)]
    if isinstance(code, str):  # as the interpreter does
        said[1] += f"{code}\n"
    code = 1 if isinstance(code, str) else code or 0
    return subprocess.CompletedProcess([script], code, *said)


@pytest.fixture(scope="session", autouse=True)
def script_server() -> Iterator[None]:
    """Ends what `run_python` started before coverage is summed up."""
    yield
    forked.stop()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """16 + 6 pictures of the demo benchmark."""
    root = tmp_path_factory.mktemp("data") / "tiny"
    sizes = ("--train", 16, "--val", 6, "--seed", 3, "--workers", 1)
    done = run_python("tools/data/make_demo_dataset.py", "--root", root, *sizes)
    assert done.returncode == 0, done.stderr
    return root


def tiny_config(data: Path, run_dir: Path) -> dict:
    """Settings with which every stage takes seconds, whichever its method, and random weights are
    asked for."""
    resnet = {
        "name": "resnet18",
        "arguments": {"channels": [8, 8, 16, 16]},
        "weights": "none",
    }
    vit = {
        "name": "vit_tiny_patch16_224",
        "arguments": {
            "img_size": 64,
            "patch_size": 16,
            "embed_dim": 32,
            "depth": 1,
            "num_heads": 2,
        },
        "weights": "none",
    }
    augment = {"scale": [0.75, 1.25], "crop": 64, "jitter": [0.2, 0.2, 0.2, 0.0]}
    crf = {"iterations": 2, "sxy_bilateral": 20, "srgb_bilateral": 8}
    leopart = {"epochs": 1, "batch_size": 4, "prototypes": 6, "hidden": 16, "width": 8, "queue": 16}
    leopart |= {"large": 64, "small": 32, "smalls": 1}
    pairs = {"epochs": 1, "batch_size": 4, "augment": {"crop": 64, "jitter": [0, 0, 0, 0]}}
    rsepm = {"width": 8, "low_width": 8, "rates": [2, 4]}
    rsepm |= {"recur_from": 0.25, "mix_from": 0.5}  # of four steps
    return {
        "run_dir": str(run_dir),
        "device": "cpu",
        "precision": "fp32",
        "workers": 0,
        "checkpoint_every": 2,
        "data": {"root": str(data), "classes": CLASSES, "biased_classes": CLASSES[:4]},
        "uss": {
            "backbone": vit,
            "code_dim": 8,
            "resolution": 64,
            "iterations": 4,
            "batch_size": 4,
            "samples": 5,
            "neighbours": 3,
            "centre": True,
            "leopart": leopart,
        },
        "wsss": {
            "backbone": resnet,
            "output_stride": 8,
            "epochs": 1,
            "batch_size": 4,
            "augment": augment,
            "scales": [1.0, 1.5],
            "crf": crf,
            "irn": {**pairs, "radius": 5},
            "psa": {**pairs, "radius": 3},
            "advcam": {"steps": 2, "scales": [0.5, 1.0]},
            "rsepm": rsepm,
        },
        "debias": {"crf": crf},
        "segmentation": {
            "backbone": resnet,
            "aspp_dim": 8,
            "low_dim": 8,
            "rates": [2, 4],
            "epochs": 1,
            "batch_size": 4,
            "augment": augment,
            "crf": crf,
        },
        "evaluation": {"scales": [1.0], "crf": crf},
    }


@pytest.fixture
def experiment(tiny_data, tmp_path) -> Path:
    """A configuration file of a tiny experiment with its own run folder."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tiny_data, tmp_path / "run")))
    return path
