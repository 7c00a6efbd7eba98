"""The pictures of docs/method.md, drawn from a small run of stage 3."""

import cv2
import numpy as np
import pytest
import yaml
from conftest import CLASSES, run_inside

from core.data.labels import write_label
from core.data.lists import read_split
from core.data.settings import DataConfig


@pytest.fixture
def debiased(tiny_data, experiment):
    """A finished stage 3 on squares for labels and noise for features."""
    settings, folder = yaml.safe_load(experiment.read_text()), experiment.parent
    settings["wsss"]["labels_dir"] = str(folder / "labels")
    settings["uss"] |= {"features_dir": str(folder / "features"), "centre": False}
    settings["debias"]["refine"] = "none"
    experiment.write_text(yaml.safe_dump(settings))
    (folder / "features").mkdir()
    rng = np.random.default_rng(0)
    split = read_split(DataConfig(root=str(tiny_data), classes=tuple(CLASSES)), "train")
    for k, tags in enumerate(split.tags):
        label = np.zeros((128, 128), np.uint8)
        label[32:96, 32:96] = 1 + tags.argmax()
        write_label(folder / f"labels/train_{k:05d}.png", label)
        np.save(folder / f"features/train_{k:05d}.npy", rng.standard_normal((4, 8, 8)))
    done = run_inside("make_debiased_labels.py", "--config", experiment)
    assert done.returncode == 0, done.stderr
    return experiment


def test_method_is_drawn(debiased, tmp_path):
    command = ("tools/audit/draw_method.py", "--config", debiased, "--output", tmp_path / "out")
    done = run_inside(*command, "--ids", "[train_00003, train_00001]")
    assert done.returncode == 0, done.stderr
    pictures = [cv2.imread(str(tmp_path / "out" / n)) for n in ("method.png", "selection.png")]
    assert all(picture is not None and picture.std() > 0 for picture in pictures)
    done = run_inside(*command, "--ids", "[train_1]")
    assert done.returncode == 1 and "no image 'train_1'" in done.stderr
