"""All stages on a tiny data set, run as a user runs them."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import yaml
from conftest import CLASSES, run_python

from core.data.labels import read_label, write_label
from core.run import checkpoint

WEAK = ("train_uss.py", "train_wsss.py", "make_debiased_labels.py", "train_segmentation.py")


def run_stage(script: str, experiment: Path, *arguments) -> subprocess.CompletedProcess:
    return run_python(script, "--config", experiment, *arguments)


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    found = (p for p in sorted(folder.glob(pattern)) if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory) -> Path:
    """The run folder of a finished experiment; its configuration lies beside it."""
    from conftest import tiny_config

    folder = tmp_path_factory.mktemp("finished")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tiny_data, folder / "run")))
    for script in (*WEAK, "evaluate.py"):
        done = run_stage(script, path)
        assert done.returncode == 0, done.stderr
    return folder / "run"


def test_every_stage_leaves_its_artefacts(finished):
    for name in ("wsss/labels", "debias/labels"):
        labels = sorted((finished / name).glob("*.png"))
        assert len(labels) == 16
        for path in labels:
            read_label(path, len(CLASSES), (128, 128))
    scores = json.loads((finished / "evaluation/mars/scores.json").read_text())
    assert scores["images"] == {"scored": 6, "of": 6, "skipped": []} and 0 <= scores["miou"] <= 1
    manifest = json.loads((finished / "segmentation/mars/manifest.json").read_text())
    assert manifest["finished"] and manifest["inputs"]["labels"]["count"] == 16
    assert not list(finished.rglob("*.part"))


def test_debiasing_only_ever_marks_labelled_pixels(finished):
    marked = 0
    for path in (finished / "debias/labels").glob("*.png"):
        before, after = read_label(finished / "wsss/labels" / path.name), read_label(path)
        changed = before != after
        assert (after[changed] == 254).all() and (before[changed] > 0).all()
        marked += changed.sum()
    assert marked > 0


def test_cut_that_does_not_fit_the_features_is_warned_of(finished, tmp_path):
    """Cosines of centred features are small: a threshold of 0.5 removes all that is labelled."""
    options = ("--debias.cut=fixed", "--debias.refine=none", f"--debias.output_dir={tmp_path}")
    done = run_stage(WEAK[2], finished.parent / "tiny.yaml", *options)
    assert done.returncode == 0 and "removed nearly all labels" in done.stderr
    assert "debias.cut auto" in done.stderr


def test_second_call_does_nothing(finished):
    before = files(finished, "debias/**/*")
    for script in WEAK:
        done = run_stage(script, finished.parent / "tiny.yaml")
        assert done.returncode == 0 and "finished earlier" in done.stdout
    after = files(finished, "debias/**/*")
    for found in (before, after):  # it notes files that are old enough by now
        found.pop("debias/inputs.json")
    assert after == before


def test_other_settings_are_refused_in_the_same_folder(finished):
    done = run_stage("train_wsss.py", finished.parent / "tiny.yaml", "--wsss.epochs=2")
    assert done.returncode == 1 and "wsss.epochs: 1 there, 2 now" in done.stderr
    assert "Traceback" not in done.stderr


def test_weak_stages_need_no_masks(finished, tiny_data, tmp_path):
    """The same bytes come out when no ground truth exists."""
    blind = tmp_path / "blind"
    shutil.copytree(
        tiny_data, blind, ignore=shutil.ignore_patterns("SegmentationClass", "StuffClass")
    )
    config = yaml.safe_load((finished.parent / "tiny.yaml").read_text())
    config["run_dir"], config["data"]["root"] = str(tmp_path / "run"), str(blind)
    path = tmp_path / "blind.yaml"
    path.write_text(yaml.safe_dump(config))
    for script in WEAK:
        done = run_stage(script, path)
        assert done.returncode == 0, done.stderr
    for pattern in ("wsss/labels/*", "debias/labels/*", "debias/clusters/*"):
        assert files(tmp_path / "run", pattern) == files(finished, pattern)
    done = run_stage("train_segmentation.py", path, "--segmentation.mode=supervised")
    assert done.returncode == 1 and "label maps are missing" in done.stderr


def test_submission_needs_neither_masks_nor_tags(finished, tiny_data, tmp_path):
    root = tmp_path / "data"
    ignored = shutil.ignore_patterns("SegmentationClass", "StuffClass", "Annotations")
    shutil.copytree(tiny_data, root, ignore=ignored)
    lists = root / "ImageSets" / "Segmentation"
    (lists / "test.txt").write_text((lists / "val.txt").read_text())
    settings = (f"--data.root={root}", "--data.tags=tags.csv", "--submission=comp6_test_cls")
    config = finished.parent / "tiny.yaml"
    done = run_stage("evaluate.py", config, *settings)
    assert done.returncode == 1 and "give --data.val_list test" in done.stderr
    done = run_stage("evaluate.py", config, *settings, "--data.val_list=test")
    assert done.returncode == 0, done.stderr
    assert "VOC's server expects VOC's classes in their order" in done.stderr
    archive = finished / "evaluation/comp6_test_cls/comp6_test_cls.tar.gz"
    done = run_python("tools/submit_voc.py", "--check", archive, "--voc", root)
    assert done.returncode == 0 and "6 predictions, nothing wrong" in done.stdout, done.stderr
    before = archive.read_bytes()
    settings = (*settings[:2], "--data.val_list=test", "--competition=comp6_test_cls")
    done = run_stage("tools/submit_voc.py", config, *settings)
    assert done.returncode == 0 and archive.read_bytes() == before, done.stderr


@pytest.mark.parametrize(
    ("script", "setting"),
    [("train_uss.py", "--uss.features_dir"), ("train_wsss.py", "--wsss.labels_dir")],
)
def test_stage_whose_results_come_from_elsewhere_is_skipped(finished, tmp_path, script, setting):
    done = run_stage(script, finished.parent / "tiny.yaml", f"{setting}={tmp_path}")
    assert done.returncode == 0 and "skipped" in done.stdout


FOLDERS = dict(zip(WEAK, ("uss", "wsss", "debias", "segmentation"), strict=True))


def changes(run: Path) -> set[tuple[str, int]]:
    """Everything that a stage has finished writing: new files, and checkpoints written again."""
    found = set()
    for path in run.rglob("*.[np][pnt][gzh]"):
        try:
            found.add((str(path), path.stat().st_mtime_ns))
        except FileNotFoundError:
            continue  # renamed in between
    return found


@pytest.mark.parametrize("script", WEAK)
def test_killed_stage_goes_on_to_the_same_bytes(finished, tmp_path, script):
    run = tmp_path / "run"
    upstream = {
        "make_debiased_labels.py": ("uss", "wsss"),
        "train_segmentation.py": ("wsss", "debias"),
    }
    for name in upstream.get(script, ()):
        shutil.copytree(finished / name, run / name)
    settings = (f"--config={finished.parent / 'tiny.yaml'}", f"--run_dir={run}")
    for kill in range(2):
        before = changes(run)
        process = forked.start(script, *settings)
        while process.poll() is None and len(changes(run) - before) < 1 + 8 * kill:
            time.sleep(0.005)
        status = process.kill()
        assert kill or status == -signal.SIGKILL, "ended before it was killed"
    done = run_python(script, *settings)
    assert done.returncode == 0, done.stderr
    for pattern in ("labels/*", "clusters/*", "cams/*", "centroids.npz", "**/checkpoint.pth"):
        whole = finished / FOLDERS[script]
        if script == "train_segmentation.py":
            whole, ours = whole / "mars", run / "segmentation" / "mars"
        else:
            ours = run / FOLDERS[script]
        assert files(ours, pattern) == files(whole, pattern), pattern


def test_two_processes_in_one_folder_are_refused(finished, tmp_path):
    import fcntl

    run = tmp_path / "run"
    (run / "uss").mkdir(parents=True)
    with (run / "uss" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run_stage("train_uss.py", finished.parent / "tiny.yaml", f"--run_dir={run}")
    assert done.returncode == 1 and "another process" in done.stderr


def test_anybodys_labels_and_features_can_enter(finished, tmp_path):
    """The one-liner for other people's artefacts, on exported features."""
    config = finished.parent / "tiny.yaml"
    features, output = tmp_path / "features", tmp_path / "ours"
    done = run_stage("tools/export_features.py", config, "--output", features)
    assert done.returncode == 0, done.stderr
    done = run_stage(
        "make_debiased_labels.py",
        config,
        f"--wsss.labels_dir={finished / 'wsss/labels'}",
        f"--uss.features_dir={features}",
        f"--debias.output_dir={output}",
    )
    assert done.returncode == 0, done.stderr
    assert len(list((output / "labels").glob("*.png"))) == 16


def test_labels_of_an_image_without_tags_stay_as_they_are(finished, tiny_data, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    listed = (root / "ImageSets/Segmentation/train.txt").read_text().split()
    labels = {i: read_label(finished / f"wsss/labels/{i}.png") for i in listed}
    chosen = max(listed, key=lambda i: (labels[i] > 0).sum())
    path = root / "Annotations" / f"{chosen}.xml"
    path.write_text(re.sub(r"<object>.*</object>", "", path.read_text(), flags=re.DOTALL))
    done = run_stage(
        "make_debiased_labels.py",
        finished.parent / "tiny.yaml",
        f"--data.root={root}",
        f"--wsss.labels_dir={finished / 'wsss/labels'}",
        f"--debias.output_dir={tmp_path / 'ours'}",
    )
    assert done.returncode == 0, done.stderr
    after = read_label(tmp_path / f"ours/labels/{chosen}.png")
    assert (after > 0).any() and np.array_equal(after, labels[chosen])


def test_stage_3_refuses_labels_of_other_settings_than_it_is_given(finished, tmp_path):
    output = tmp_path / "ours"
    done = run_stage(
        "make_debiased_labels.py",
        finished.parent / "tiny.yaml",
        "--wsss.threshold=0.61",
        f"--debias.output_dir={output}",
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "wsss, which this stage reads, is stale" in done.stderr
    assert "and run: python train_wsss.py, with" in done.stderr
    assert "wsss.threshold" in done.stderr and not (output / "labels").exists()


@pytest.mark.parametrize("mode", ["wsss", "ignore", "complement", "supervised"])
def test_every_mode_trains_and_scores(finished, mode):
    config = finished.parent / "tiny.yaml"
    for script in ("train_segmentation.py", "evaluate.py"):
        done = run_stage(
            script, config, f"--segmentation.mode={mode}", "--segmentation.refine=none"
        )
        assert done.returncode == 0, done.stderr
    assert (finished / "evaluation" / mode / "scores.json").exists()


def test_warm_up_as_background_is_training_on_labels_without_biased_pixels(finished, tmp_path):
    for path in (finished / "debias/labels").glob("*.png"):
        label = read_label(path)
        write_label(tmp_path / "labels" / path.name, np.where(label == 254, 0, label))
    weights = []
    for k, options in enumerate(
        (
            ("mode=mars", "warmup=0.999", "warmup_label=background"),
            ("mode=wsss", f"labels_dir={tmp_path / 'labels'}"),
            ("mode=mars", "warmup=0.999"),
        )
    ):
        arguments = [f"--segmentation.{option}" for option in (*options, f"name=of{k}")]
        done = run_stage(WEAK[3], finished.parent / "tiny.yaml", *arguments)
        assert done.returncode == 0, done.stderr
        weights.append(checkpoint.load(finished / f"segmentation/of{k}/checkpoint.pth")["ema"])
    same, other = (all(torch.equal(w[key], weights[0][key]) for key in w) for w in weights[1:])
    assert same and not other


def test_analysis_tools_run_on_a_finished_experiment(finished):
    config = finished.parent / "tiny.yaml"
    for arguments in (
        ("tools/demo/sweep_threshold.py", config, "--every=8"),
        ("tools/audit/analyse_bias.py", config, f"--control={finished / 'debias'}"),
    ):
        done = run_stage(*arguments)
        assert done.returncode == 0, done.stderr
    analysis = json.loads((finished / "analysis.json").read_text())
    assert analysis["removal"] == analysis["control"]
    assert json.loads((finished / "wsss/threshold_sweep.json").read_text())["chosen"]


def test_bad_images_are_skipped_by_choice_and_named(tiny_data, tmp_path):
    from conftest import tiny_config

    shutil.copytree(tiny_data, tmp_path / "data")
    photographs = tmp_path / "data/JPEGImages"
    (photographs / "train_00003.jpg").write_bytes(b"")
    (photographs / "val_00002.jpg").unlink()
    settings = tiny_config(tmp_path / "data", tmp_path / "run")
    settings["uss"]["method"], settings["data"]["on_bad_image"] = "frozen", "skip"
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    for script in WEAK:
        done = run_stage(script, path)
        assert done.returncode == 0 and "1 of 16 images are skipped" in done.stderr, done.stderr
    assert not (tmp_path / "run/debias/labels/train_00003.png").exists()
    manifest = json.loads((tmp_path / "run/debias/manifest.json").read_text())
    assert manifest["skipped"] == ["train_00003"] and manifest["inputs"]["labels"]["count"] == 15
    done = run_stage("evaluate.py", path)
    assert "(5/5 images, 1 skipped)" in done.stdout and "do not compare" in done.stderr
    scores = json.loads((tmp_path / "run/evaluation/mars/scores.json").read_text())
    assert scores["images"]["skipped"] == ["val_00002"]
