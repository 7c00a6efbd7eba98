import base64
import json
import re

import cv2
import numpy as np
import pytest
import yaml
from conftest import CLASSES, run_python

from core.data.labels import read_label, write_label
from core.data.lists import ground_truth, read_split
from core.data.settings import DataConfig


@pytest.fixture
def told_apart(experiment, tiny_data):
    """Features that say what every cell shows, and labels that claim all of an image's class."""
    data = DataConfig(root=str(tiny_data), classes=tuple(CLASSES))
    split = read_split(data, "train")
    folder = experiment.parent
    (folder / "features").mkdir()
    for index, path in enumerate(ground_truth(data, split)):
        mask = read_label(path, 8)
        cells = cv2.resize(mask, (32, 32), interpolation=cv2.INTER_NEAREST)
        feat = np.eye(256, dtype=np.float32)[cells].transpose(2, 0, 1)[:9]
        feat[0, cells == 255] = 1
        np.save(folder / f"features/{split.ids[index]}.npy", feat)
        label = np.full(mask.shape, split.tags[index].nonzero()[0][0] + 1, np.uint8)
        label[:8] = 0
        write_label(folder / f"labels/{split.ids[index]}.png", label)
    settings = yaml.safe_load(experiment.read_text())
    settings["uss"]["features_dir"] = str(folder / "features")
    settings["wsss"]["labels_dir"] = str(folder / "labels")
    experiment.write_text(yaml.safe_dump(settings))
    return experiment


def inspect(config, *options):
    return run_python("tools/inspect_features.py", "--config", config, *options)


def test_one_row_of_four_pictures_for_each_image(told_apart):
    output = told_apart.parent / "seen.png"
    done = inspect(told_apart, "--output", output, "--images", 3)
    assert done.returncode == 0, done.stderr
    picture = cv2.imread(str(output))
    assert picture.shape == (3 * 228, 4 * 224, 3)
    similar = picture[:224, 3 * 224 :]
    assert {*np.unique(similar)} == {0, 255} and (similar == similar[..., :1]).all()


def test_clusters_of_perfect_features_separate_object_from_context(told_apart):
    output = told_apart.parent / "seen.png"
    done = inspect(told_apart, "--output", output, "--separation", "--uss.centre=true")
    assert done.returncode == 0, done.stderr
    scores = json.loads(output.with_suffix(".json").read_text())["all"]
    assert scores["none"] < 0.9 < 0.95 < scores["clusters"]


def test_page_holds_the_pictures_and_the_codes_of_every_cell(told_apart):
    output = told_apart.parent / "seen.html"
    done = inspect(told_apart, "--output", output, "--images", 2)
    assert done.returncode == 0, done.stderr
    html = output.read_text()
    assert html.count("data:image/jpeg;base64,") == 2
    assert html.count("data:image/png;base64,") == 4
    assert not re.search(r"(src|href)=.?(https?:|//)", html)  # nothing from a network
    data = json.loads(re.search(r"const images = (.*?)\.map\(", html)[1])
    assert "100.0% of the features" in html  # 9 channels: nothing is left out
    for image in data:
        codes = np.frombuffer(base64.b64decode(image["codes"]), np.int8)
        lengths = np.linalg.norm(codes.reshape(32 * 32, 9).astype(float), axis=1)
        assert (image["rows"], image["columns"]) == (32, 32) and abs(lengths - 127).max() < 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "seen.jpg"), "must end in .png or .html"),
        (("--ids", "[nowhere]"), "no image 'nowhere'"),
        (("--pixel", "[2, 0]"), "--pixel needs two numbers"),
        (("--images", "0"), "at least 1"),
    ],
)
def test_wrong_choice_is_told(told_apart, options, message):
    done = inspect(told_apart, *options)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
