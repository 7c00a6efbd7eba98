"""What is unusual but right must go through: odd photographs, odd label maps, odd tags.

Also what happens to processes: one that loads images dies, somebody presses Ctrl-C. Minutes long,
so run by tools/test.sh --all.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, run_python, tiny_config
from PIL import Image

from core.data.labels import BIASED_ON_DISK, read_label, write_label
from core.run import checkpoint

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums in one order
pytestmark = pytest.mark.slow
STAGES = (
    "train_uss.py",
    "train_wsss.py",
    "make_debiased_labels.py",
    "train_segmentation.py",
    "evaluate.py",
)


def photograph(mode: str, size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(size[0])
    pixels = Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65535, size[::-1], dtype=np.uint16))
    return pixels.convert(mode)


ODD = {
    "one_pixel.png": ("RGB", (1, 1), {}),
    "flat.png": ("RGB", (200, 2), {}),
    "tall.jpg": ("RGB", (3, 300), {}),
    "grey.jpg": ("L", (50, 40), {}),
    "bits.png": ("1", (50, 40), {}),
    "palette.png": ("P", (50, 40), {}),
    "cmyk.jpg": ("CMYK", (50, 40), {}),
    "alpha.png": ("RGBA", (50, 40), {}),
    "grey_alpha.png": ("LA", (50, 40), {}),
    "deep.png": ("I;16", (50, 40), {}),
    "turned.jpg": ("RGB", (50, 40), {"orientation": 6}),
    "large.jpg": ("RGB", (640, 480), {}),
    "no tag.webp": ("RGB", (50, 40), {}),
}


@pytest.fixture
def odd_photographs(tmp_path) -> tuple[Path, dict]:
    """Photographs of every kind, "no tag" without a tag, and a class that no photograph shows."""
    root = tmp_path / "photographs"
    (root / "masks").mkdir(parents=True)
    rows = []
    for k, (name, (mode, size, options)) in enumerate(ODD.items()):
        exif = Image.Exif()
        exif[0x0112] = options.get("orientation", 1)
        photograph(mode, size).save(root / name, exif=exif)
        rows.append(f"{name},{'' if name.startswith('no tag') else ('boat', 'car')[k % 2]}")
        shape = size if "orientation" in options else size[::-1]
        write_label(root / "masks" / f"{name.split('.')[0]}.png", np.zeros(shape, np.uint8))
    (root / "tags.csv").write_text("image,tags\n" + "\n".join(rows) + "\n")
    settings = tiny_config(root, tmp_path / "run")
    classes = ["boat", "car", "never"]
    settings["data"] = {"format": "folder", "root": str(root), "classes": classes}
    settings["data"] |= {"tags": "tags.csv", "masks": "masks"}
    settings["uss"]["method"] = "frozen"
    return tmp_path / "odd.yaml", settings


def test_odd_photographs_go_through_all_stages(odd_photographs):
    path, settings = odd_photographs
    path.write_text(yaml.safe_dump(settings))
    for script in STAGES:
        done = run_python(script, "--config", path)
        assert done.returncode == 0, (script, done.stderr[-2000:])
    run = path.parent / "run"
    for name, (_, size, options) in ODD.items():
        shape = size if "orientation" in options else size[::-1]
        read_label(run / f"evaluation/mars/predictions/{name.split('.')[0]}.png", 3, shape)
        if not name.startswith("no tag"):  # is not trained on
            for folder in ("wsss/labels", "debias/labels"):
                read_label(run / folder / f"{name.split('.')[0]}.png", 3, shape)


def test_odd_label_maps_are_debiased(odd_photographs):
    """All background, all class, a class of one pixel (fewer than K clusters), all ignored."""
    path, settings = odd_photographs
    labels = path.parent / "labels"
    for k, (name, (_, size, options)) in enumerate(ODD.items()):
        label = np.zeros(size if "orientation" in options else size[::-1], np.uint8)
        if k % 4 == 1:
            label[:] = 1 + k % 2
        elif k % 4 == 2:
            label[0, 0] = 1
        elif k % 4 == 3:
            label[:] = 255
        labels.mkdir(exist_ok=True)
        write_label(labels / f"{name.split('.')[0]}.png", label)
    settings["wsss"]["labels_dir"] = str(labels)
    path.write_text(yaml.safe_dump(settings))
    for script in ("train_uss.py", "make_debiased_labels.py"):
        done = run_python(script, "--config", path)
        assert done.returncode == 0, done.stderr[-2000:]
    for made in sorted((path.parent / "run/debias/labels").iterdir()):
        before, after = read_label(labels / made.name), read_label(made)
        changed = before != after
        assert (after[changed] == BIASED_ON_DISK).all() and not np.isin(
            before[changed], (0, 255)
        ).any()


@pytest.fixture
def long_training(tiny_data, tmp_path) -> Path:
    """The configuration of a classifier's training that takes a while, with loading processes."""
    settings = tiny_config(tiny_data, tmp_path / "run")
    settings["workers"] = 2
    settings["wsss"]["epochs"] = 40
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def begin(path: Path) -> subprocess.Popen:
    """The training, once it has a checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "train_wsss.py", "--config", str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env=ONE_THREAD,
    )
    while not (path.parent / "run/wsss/checkpoint.pth").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    return process


def children(process: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(k) for k in path.read_text().split()]


def ends_well(path: Path, whole: dict) -> None:
    """The training goes on, and ends with the weights of one that was not disturbed."""
    done = run_python("train_wsss.py", "--config", path, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    state = checkpoint.load(path.parent / "run/wsss/checkpoint.pth")
    assert all(bool((v == whole["network"][k]).all()) for k, v in state["network"].items())


@pytest.fixture
def undisturbed(long_training) -> dict:
    done = run_python("train_wsss.py", "--config", long_training, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    state = checkpoint.load(long_training.parent / "run/wsss/checkpoint.pth")
    shutil.rmtree(long_training.parent / "run")
    return state


@pytest.mark.parametrize("fault", ["a loading process dies", "Ctrl-C"])
def test_training_is_interrupted_and_goes_on(long_training, undisturbed, fault):
    process = begin(long_training)
    if fault == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(children(process)[-1], signal.SIGKILL)
    told = process.communicate(timeout=60)[0]
    last = told.splitlines()[-2:]  # torch reports a dead process wherever Python happens to be
    assert process.returncode == 1 and "resumes from here" in last[-1], told
    assert fault == "Ctrl-C" or "workers: 0" in last[0], told
    assert fault != "Ctrl-C" or "Traceback" not in told
    ends_well(long_training, undisturbed)


def test_photograph_that_breaks_while_it_is_used(long_training, tiny_data, tmp_path):
    """Told in one message, though a process of its own read it."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    settings = yaml.safe_load(long_training.read_text())
    settings["data"]["root"] = str(data)
    long_training.write_text(yaml.safe_dump(settings))
    photo = sorted((data / "JPEGImages").glob("train_*.jpg"))[3]
    photo.write_bytes(photo.read_bytes()[:700])
    done = run_python("train_wsss.py", "--config", long_training)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{photo} cannot be decoded" in done.stderr
