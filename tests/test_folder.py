"""A folder of photographs with tags and without masks, from the first check to predictions."""

import csv
import re
import subprocess

import cv2
import numpy as np
import pytest
import yaml
from conftest import ROOT, run_python, tiny_config

from core.data.labels import read_label


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Twelve pictures of several sizes and formats: discs and squares on noise."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for k in range(12):
        shape = (64 + 8 * (k % 3), 80 - 8 * (k % 2), 3)
        picture = rng.integers(90, 160, shape).astype(np.uint8)
        if k % 2:
            cv2.circle(picture, (40, 32), 18, (200, 40, 30), -1)
        else:
            cv2.rectangle(picture, (20, 16), (52, 48), (30, 60, 220), -1)
        folder = root / ("disc" if k % 2 else "square") / "album one"
        folder.mkdir(parents=True, exist_ok=True)
        suffix = (".jpg", ".png", ".webp")[k % 3]
        assert cv2.imwrite(str(folder / f"picture {k}{suffix}"), picture)
    return root


def test_folder_of_photographs_runs_through_all_stages(photographs, tmp_path):
    settings = tiny_config(photographs, tmp_path / "run")
    settings["data"] = {"format": "folder", "root": str(photographs)}
    settings["segmentation"]["refine"] = "none"
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(settings))
    said = ""
    for step in sorted(ROOT.glob("tools/0[0-5]_*.sh")):  # as tools/run_all.sh does
        (script,) = re.findall(r"^exec \.venv/bin/python (\S+)", step.read_text(), re.MULTILINE)
        done = run_python(script, "--config", path)
        assert done.returncode == 0, done.stderr
        said += done.stdout
    assert "0 problems" in said and "not scored" in said
    predictions = sorted((tmp_path / "run/evaluation/mars/predictions").rglob("*.png"))
    assert len(predictions) == 12
    assert (
        predictions[0]
        .relative_to(tmp_path / "run")
        .as_posix()
        .endswith("predictions/disc/album one/picture 1.png")
    )
    results = tmp_path / "results"
    command = ("--config", path, "--images", photographs / "disc", "--output", results)
    done = run_python("tools/predict.py", *command)
    assert done.returncode == 0, done.stderr
    label = read_label(results / "labels/album one/picture 1.png", 2, (72, 72))
    overlay = cv2.imread(str(results / "overlays/album one/picture 1.jpg"))
    assert overlay.shape[:2] == label.shape
    with (results / "shares.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 6 and {*rows[0]} == {"image", "background", "disc", "square"}
    row = next(row for row in rows if row["image"] == "album one/picture 1")
    assert float(row["disc"]) == round((label == 1).mean(), 4)
    done = run_python("tools/predict.py", *command[:5], photographs / "disc" / "out")
    assert done.returncode == 1 and "would be read as input" in done.stderr
    wrong = ("--images", photographs / "disc", "--output", tmp_path / "never")
    done = run_python("tools/predict.py", "--config", path, *wrong, "--segmentation.aspp_dim", 9)
    assert done.returncode == 1 and "give the --config and options of the run" in done.stderr
    assert not (tmp_path / "never").exists()


def test_all_stages_in_one_command_end_with_the_first_that_fails(tmp_path):
    command = ["bash", "tools/run_all.sh", "--config", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "none.yaml" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.count("==") == 1 and "00_check_data.sh" in done.stdout
