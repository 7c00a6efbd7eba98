"""The tables of the study on photographs, on drawings."""

import csv
import json

import cv2
import numpy as np
import pytest
from conftest import CLASSES, run_python
from test_jobs import check_order

from core.config import make_parser, parse
from core.data.labels import read_label
from core.data.lists import ground_truth, read_split
from tools.common.experiment import experiment_jobs
from tools.paper import photographs, reproduce


def test_each_job_of_the_study_comes_after_those_it_reads_from():
    run = reproduce.experiment("photos", 1, ("--data.root=there",), reproduce.LAPTOP)
    jobs = experiment_jobs(run.arguments, run.run_dir)
    jobs += photographs.feature_jobs(run.arguments, run.run_dir)
    check_order(jobs)
    assert {job.name for job in jobs} >= {"stego: debias", "random: score", "classifier: train"}
    for job in jobs:  # every command line is understood
        if job.command[0] in ("train_uss.py", "make_debiased_labels.py"):
            config, _ = parse(make_parser("x", ""), job.command[1:])
            raw = any(name in job.command[-2] for name in ("raw", "centred", "demo", "leopart"))
            assert (config.uss.whiten is None) == (raw or config.uss.method == "stego")
    leopart, _ = parse(
        make_parser("x", ""), next(j for j in jobs if j.name == "leopart: features").command[1:]
    )
    assert leopart.uss.method == "leopart" and leopart.uss.backbone.arguments["depth"] == 6


@pytest.fixture
def experiment(tiny_data, tmp_path):
    """A configuration and a run whose labels are the masks, and whose debiased labels are empty."""
    arguments = [f"--data.root={tiny_data}", f"--data.classes=[{','.join(CLASSES)}]"]
    arguments += ["--data.train_list=train", "--data.biased_classes=[boat, train]"]
    config, _ = parse(make_parser("x", ""), [*arguments, f"--run_dir={tmp_path}"])
    split = read_split(config.data, "train")
    for image_id, mask in zip(split.ids, ground_truth(config.data, split), strict=True):
        label = read_label(mask)
        for folder in ("wsss/labels", "wsss/labels_best", "debias/labels"):
            path = tmp_path / folder / f"{image_id}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), label * (folder != "debias/labels"))
    for name in (*photographs.COLUMNS, "labels_wsss"):
        matrix = np.eye(9, dtype=int) * 100
        matrix[0, 1] = 100 * (name != "mars")  # background taken for a boat
        path = tmp_path / "evaluation" / name / "scores.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"confusion_matrix": matrix.tolist()}))
    return config, tmp_path, arguments


def test_tables_of_labels_and_segmenters(experiment):
    config, run, _ = experiment
    labels = photographs.labels_table([config] * 2, [run] * 2)
    rows = {row[0].split(" (")[0]: row[1:] for row in labels.rows}
    assert rows["boat"][0] == "100.0 (100.0 .. 100.0)" and rows["boat"][4].startswith("0.0")
    assert {*rows} == {
        "background",
        *CLASSES,
        "all, with background",
        "biased classes",
        "rarer classes",
    }
    found = photographs.segmenters_table([config], [run])
    rows = {
        row[0].split(" (")[0]: dict(zip(found.columns[1:], row[1:], strict=True))
        for row in found.rows
    }
    assert rows["boat"]["gain of MARS"] == 50 and rows["car"]["gain of MARS"] == 0
    assert rows["biased classes"]["gain of MARS"] == 25
    assert rows["boat"]["WSSS, best threshold: FP"] == 50 and rows["boat"]["MARS: FP"] == 0


def test_audit_is_compared_by_ranks(experiment):
    config, run, _ = experiment
    with (run / "debias/audit.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "score", "removed"])
        writer.writerows(
            [name, 1 / (1 + k), 0.5 * (name == "boat")] for k, name in enumerate(CLASSES)
        )
    ((seed, score, removed),) = photographs.audit_table([config], [run]).rows
    assert seed == 0 and removed == 1 and 0.5 < score < 0.6  # of 8 classes, one has false positives


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([1, 2, 9], [1, 4, 5], 1), ([1, 2, 3], [3, 2, 1], -1), ([0, 0, 1], [0, 0, 7], 1)],
)
def test_rank_correlation(a, b, expected):
    assert np.isclose(photographs.rank_correlation(np.array(a), np.array(b)), expected)


def test_unseen_photographs_are_two_thirds_whatever_the_list(tiny_data, experiment):
    split = read_split(experiment[0].data, "train")
    chosen = {split.ids[k] for k in photographs.unseen(split)}
    assert 5 <= len(chosen) <= 15 and len(split) == 16


def test_context_of_each_class_before_and_after(experiment, tmp_path):
    config, run, arguments = experiment
    names, contexts = [*CLASSES, "sky", "water"], tmp_path / "contexts"
    contexts.mkdir()
    split = read_split(config.data, "train")
    for image_id, mask in zip(split.ids, ground_truth(config.data, split), strict=True):
        truth = read_label(mask)
        truth[:64][truth[:64] == 0] = 9  # sky above, water below
        truth[truth == 0] = 10
        label = np.where(truth == 10, 1, np.where(truth < 9, truth, 0)).astype(np.uint8)
        cv2.imwrite(str(contexts / f"{image_id}.png"), truth)
        cv2.imwrite(str(run / "wsss/labels" / f"{image_id}.png"), label)
        cv2.imwrite(str(run / "debias/labels" / f"{image_id}.png"), label * (truth < 9))
    (tmp_path / "names.txt").write_text("\n".join(names))
    options = [
        "--contexts",
        contexts,
        "--names",
        tmp_path / "names.txt",
        "--output",
        tmp_path / "o.csv",
    ]
    folders = [f"before={run}/wsss/labels", f"after={run}/debias/labels"]
    done = run_python("tools/audit/context_table.py", *arguments, *options, "--labels", *folders)
    assert done.returncode == 0, done.stderr
    rows = {row[0]: row for row in csv.reader((tmp_path / "o.csv").open())}
    assert rows["class"][1:] == [
        "before: itself",
        "before: context",
        "after: itself",
        "after: context",
    ]
    assert rows["boat"][2].startswith("water ") and rows["boat"][3:] == ["100 %", "water 0"]
    assert rows["car"][1:] == ["100 %", "", "100 %", ""] and "| boat |" in done.stdout
    (tmp_path / "names.txt").write_text("water")
    done = run_python("tools/audit/context_table.py", *arguments, *options, "--labels", *folders)
    assert done.returncode == 1 and "lacks the classes bird, boat" in done.stderr
