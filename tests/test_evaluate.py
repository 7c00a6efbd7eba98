"""Scoring two folders without a configuration, and what it refuses."""

import json

import numpy as np
import pytest
from conftest import run_python
from PIL import Image
from sklearn.metrics import confusion_matrix

from core.data.labels import palette, read_label, write_label
from core.metrics import score_files
from core.run.errors import UserError


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        truth = rng.integers(0, 3, (20, 30)).astype(np.uint8)
        write_label(tmp_path / "masks" / f"{name}.png", truth)
        write_label(tmp_path / "predictions" / f"{name}.png", truth)
    return tmp_path


def evaluate(folder, *arguments):
    paths = ("--predictions", folder / "predictions", "--masks", folder / "masks")
    return run_python("evaluate.py", *paths, "--num_classes", 2, *arguments)


def test_perfect_predictions_score_one(folders):
    done = evaluate(folders, "--output", folders / "scores.json")
    assert done.returncode == 0, done.stderr
    scores = json.loads((folders / "scores.json").read_text())
    assert scores["miou"] == 1 and scores["fp"] == scores["fn"] == 0
    assert "(3/3 images)" in done.stdout


def test_missing_prediction_is_refused_unless_allowed(folders):
    (folders / "predictions" / "b.png").unlink()
    done = evaluate(folders)
    assert done.returncode == 1 and "1 of 3 predictions are missing" in done.stderr
    done = evaluate(folders, "--allow-missing")
    assert done.returncode == 0 and "(2/3 images)" in done.stdout


def test_wrong_calls_are_refused(folders):
    masks = folders / "masks"
    for arguments, told in (
        (("--predictions", masks), "holds the masks; correct --predictions"),
        (("--num_classes", 254), "--num_classes must be 1 to 253: 254"),
        (("--num_classes", -1), "--num_classes must be 1 to 253: -1"),
        (("--name", "../elsewhere"), "must be the name of one folder"),
        (("--submission", "comp6_test_cls"), "--submission packs the network's own predictions"),
        (("--name", "mine"), "give --output scores.json"),
    ):
        done = evaluate(folders, *arguments)
        assert done.returncode == 1 and told in done.stderr, done.stderr
    for name, classes in (("predictions", ["boat", "train"]), ("masks", ["train", "boat"])):
        (folders / name / "made_from.json").write_text(json.dumps({"classes": classes}))
    done = evaluate(folders)
    assert done.returncode == 1 and "label 1 is 'boat' there, 'train' now" in done.stderr


def test_scores_of_vocs_masks_equal_an_independent_computation(voc_masks, tmp_path):
    rng, matrix = np.random.default_rng(0), np.zeros((21, 21), int)
    for path in sorted(voc_masks.glob("*.png")):
        truth = read_label(path)
        guess = np.roll(truth, rng.integers(-9, 10, 2), (0, 1))  # brings 255 into the prediction
        strange = rng.random(truth.shape) < 0.05
        guess[strange] = rng.integers(0, 21, strange.sum())
        guess[rng.random(truth.shape) < 0.02] = 254
        write_label(tmp_path / "predictions" / path.name, guess)
        valid = truth != 255
        counted = np.where(guess > 20, 0, guess)[valid]
        matrix += confusion_matrix(truth[valid], counted, labels=range(21))
    folders = ("--predictions", tmp_path / "predictions", "--masks", voc_masks)
    done = run_python(
        "evaluate.py", *folders, "--num_classes", 20, "--output", tmp_path / "scores.json"
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    hits = [int(matrix[k, k]) for k in range(21)]
    false = [int(matrix[:, k].sum()) - hits[k] for k in range(21)]
    missed = [int(matrix[k].sum()) - hits[k] for k in range(21)]
    union = [sum(parts) for parts in zip(hits, false, missed, strict=True)]
    expected = {
        "miou": sum(hits[k] / union[k] for k in range(21)) / 21,
        "fp": sum(false[k] / union[k] for k in range(1, 21)) / 20,
        "fn": sum(missed[k] / union[k] for k in range(1, 21)) / 20,
        "fp_per_tp": sum(false[k] / hits[k] for k in range(1, 21)) / 20,
        "fn_per_tp": sum(missed[k] / hits[k] for k in range(1, 21)) / 20,
    }
    assert scores["confusion_matrix"] == matrix.tolist()
    for key, value in expected.items():
        assert abs(scores[key] - value) <= 1e-12, key
    iou = [hits[k] / union[k] for k in range(21)]
    assert np.abs(np.subtract(scores["per_class"]["iou"], iou)).max() <= 1e-12


def test_scores_do_not_depend_on_the_number_of_threads(tmp_path):
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 3, (2, 70, 9, 7)).astype(np.uint8)
    paths = [[tmp_path / name / f"{k}.png" for k in range(70)] for name in ("truth", "guess")]
    for label, path in zip([*truth, *guess], [*paths[0], *paths[1]], strict=True):
        write_label(path, label)
    one, three = (score_files(paths[1], paths[0], ["a", "b"], False, n) for n in (1, 3))
    assert one == three
    assert np.array_equal(
        one["confusion_matrix"], confusion_matrix(truth.ravel(), guess.ravel(), labels=range(3))
    )


@pytest.mark.parametrize(
    ("of_truth", "of_guess", "told"),
    [
        ((0, 255), (0, 0), "masks holds any class: all 3 hold only 0 and 255"),
        ((255, 255), (0, 1), "masks holds any class: all 3 hold only 255"),
        ((0, 0), (0, 1), "masks holds any class: all 3 hold only 0, the background"),
        ((0, 1), (0, 255), "predictions holds any class: all 3 hold only 0 and 255"),
    ],
)
def test_nothing_is_scored_where_no_class_occurs(folders, of_truth, of_guess, told):
    paths = {name: sorted((folders / name).iterdir()) for name in ("masks", "predictions")}
    for name, (low, high) in {"masks": of_truth, "predictions": of_guess}.items():
        for path in paths[name]:
            write_label(path, np.where(read_label(path) > 0, high, low).astype(np.uint8))
    with pytest.raises(UserError, match=told):
        score_files(paths["predictions"], paths["masks"], ["a", "b"], False, 1)


def test_predictions_without_any_class_score_next_to_nothing_and_say_so(folders):
    paths = {name: sorted((folders / name).iterdir()) for name in ("masks", "predictions")}
    for path in paths["predictions"]:
        write_label(path, np.zeros((20, 30), np.uint8))
    scores = score_files(paths["predictions"], paths["masks"], ["a", "b"], False, 1)
    assert scores["miou"] < 0.2 and "predictions holds any class" in scores["notes"][0]


def test_predictions_in_colours_of_voc_are_scored_and_it_is_said(folders):
    for path in (folders / "predictions").iterdir():
        Image.fromarray(palette()[read_label(path)]).quantize(8).save(path)
    done = evaluate(folders)
    assert done.returncode == 0 and "mIoU 100.0 %" in done.stdout
    assert "note: 3 of 3 label maps in" in done.stdout and "read by their colours" in done.stdout


@pytest.mark.parametrize("trouble", ["truncated", "wrong label", "wrong size", "empty"])
def test_bad_prediction_is_one_message(folders, trouble):
    path = folders / "predictions" / "a.png"
    if trouble == "truncated":
        path.write_bytes(path.read_bytes()[:60])
    elif trouble == "empty":
        path.write_bytes(b"")
    elif trouble == "wrong label":
        write_label(path, np.full((20, 30), 7, np.uint8))
    else:
        write_label(path, np.zeros((30, 20), np.uint8))
    done = evaluate(folders)
    assert done.returncode == 1 and "a.png" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "gone.yaml"], "gone.yaml"),
        (["--evaluation.flipp", "true"], "evaluation.flip"),
        (["--data.root", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_told_in_one_message(arguments, message):
    done = run_python("evaluate.py", *arguments)
    assert done.returncode != 0 and message in done.stderr
    assert "Traceback" not in done.stderr
