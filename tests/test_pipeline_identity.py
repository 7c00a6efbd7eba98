"""What happens when one thing that a finished run was made from is changed: stage by stage."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from conftest import tiny_config

from core.config import make_parser, parse
from core.data.labels import read_label, write_label
from core.data.lists import read_split
from core.data.tags import read_table
from core.pipeline import segmentation_identity
from core.run import checkpoint
from core.run.errors import UserError
from tools.common.tables import write_table

STAGES = ("train_uss", "train_wsss", "make_debiased_labels", "train_segmentation", "evaluate")
DONE = "finished earlier"
STALE = "is stale"


class World:
    """A folder of discs and squares with tags and masks, and a run on it."""

    def __init__(self, folder: Path):
        self.folder, self.photos, self.run = folder, folder / "photos", folder / "run"

    def draw(self) -> None:
        rng, tags = np.random.default_rng(0), {}
        (self.photos / "masks").mkdir(parents=True)
        for k in range(12):
            picture = rng.integers(90, 160, (48, 56, 3)).astype(np.uint8)
            mask = np.zeros((48, 56), np.uint8)
            if k % 2:
                cv2.circle(mask, (28, 24), 14, 1, -1)
            else:
                cv2.rectangle(mask, (14, 10), (42, 38), 2, -1)
            picture[mask > 0] = (200, 40, 30) if k % 2 else (30, 60, 220)
            cv2.imwrite(str(self.photos / f"p{k:02}.png"), picture)
            write_label(self.photos / f"masks/p{k:02}.png", mask)
            tags[f"p{k:02}.png"] = ["disc" if k % 2 else "square"]
        write_table(self.photos / "tags.csv", tags)
        for name, ids in {"train": range(8), "val": range(8, 12)}.items():
            (self.photos / f"{name}.txt").write_text("".join(f"p{k:02}\n" for k in ids))

    def configure(self) -> None:
        settings = tiny_config(self.photos, self.run)
        settings["data"] = {"format": "folder", "root": str(self.photos), "tags": "tags.csv"}
        settings["data"] |= {"masks": "masks", "train_list": "train", "val_list": "val"}
        settings["uss"] = {"backbone": settings["uss"]["backbone"], "method": "frozen"}
        settings["wsss"] |= {"refine": "none", "object_share": 0.4}
        settings["debias"] = {"refine": "none", "scale": "max"}
        settings["segmentation"] |= {"refine": "none"}
        settings["evaluation"] = {"scales": [1.0], "refine": "none"}
        (self.folder / "tiny.yaml").write_text(yaml.safe_dump(settings))

    def copy(self, folder: Path) -> "World":
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        world = World(folder)
        world.configure()
        return world

    def call(self, script: str, *options: str) -> None:
        module = importlib.import_module(script)
        arguments, sys.argv = sys.argv, [script, f"--config={self.folder / 'tiny.yaml'}", *options]
        try:
            module.main()
        finally:
            sys.argv = arguments

    def predict(self, *options: str) -> None:
        weights = self.run / "segmentation/mars/checkpoint.pth"
        places = (f"--images={self.folder / 'others'}", f"--output={self.folder / 'results'}")
        self.call("tools.predict", f"--weights={weights}", *places, *options)

    # Changes, one thing each.

    def rename_tag(self) -> None:
        """So that the names, sorted, come in another order."""
        path = self.photos / "tags.csv"
        path.write_text(path.read_text().replace("disc", "zebra"))

    def retag(self, name: str = "p02") -> None:
        table = read_table(self.photos / "tags.csv")
        write_table(self.photos / "tags.csv", table | {f"{name}.png": ["disc", "square"]})

    def repaint(self, name: str = "p02") -> None:
        path = str(self.photos / f"{name}.png")
        picture = cv2.imread(path)
        picture[:4] = 255 - picture[:4]
        cv2.imwrite(path, picture)

    def relabel(self, folder: str, name: str = "p02") -> None:
        path = self.folder / folder / f"{name}.png"
        label = read_label(path)
        label[:, :9] = np.where(label[:, :9] == 0, 2, 0)
        write_label(path, label)

    def retrain_features(self) -> None:
        path = self.run / "uss/checkpoint.pth"
        content = checkpoint.load(path)
        content["network"]["mean"] += 0.1
        checkpoint.save(path, content)

    def move(self) -> None:
        """Another spelling of the same folder, and another place of the same files."""
        self.photos.rename(self.folder / "moved")
        self.photos.symlink_to(self.folder / "moved")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> World:
    world = World(tmp_path_factory.mktemp("world"))
    world.draw()
    world.configure()
    for script in STAGES:
        world.call(script)
    others = world.folder / "others"
    others.mkdir()
    for name in ("p00.png", "p01.png"):
        shutil.copy(world.photos / name, others)
    world.predict()
    return world


FIRST = "first p02"
CASES = {
    # Stage 1 sees images; it knows neither names nor tags.
    ("train_uss", "rename_tag"): DONE,
    ("train_uss", "retag"): DONE,
    ("train_uss", "repaint"): f"images: 1 of 8 have another content, {FIRST}",
    ("train_uss", "repaint p09"): DONE,  # of the validation list
    ("train_uss", "move"): DONE,
    ("train_uss", "--uss.scales=[1.0,1.5]"): r"uss.scales: \[1.0\] there, \[1.0, 1.5\] now",
    ("train_uss", "--uss.leopart.epochs=3"): DONE,
    ("train_uss", "--uss.iterations=3"): DONE,  # of STEGO
    ("train_wsss", "rename_tag"): "label 1 is 'disc' there, 'square' now",
    ("train_wsss", "retag"): f"tags: 1 of 8 differ, {FIRST}: square there, disc;square now",
    ("train_wsss", "retag p09"): DONE,
    ("train_wsss", "repaint"): f"images: 1 of 8 have another content, {FIRST}",
    ("train_wsss", "move"): DONE,
    ("train_wsss", "--wsss.epochs=2"): "wsss.epochs: 1 there, 2 now",
    ("train_wsss", "--wsss.irn.epochs=2"): DONE,
    ("train_wsss", "--debias.alpha=0.3"): DONE,
    ("make_debiased_labels", "rename_tag"): f"wsss, which this stage reads, {STALE}.*label 1 is",
    ("make_debiased_labels", "retag"): f"wsss, which this stage reads, {STALE}.*tags: 1 of 8",
    ("make_debiased_labels", "repaint"): f"wsss, which this stage reads, {STALE}.*images: 1 of 8",
    ("make_debiased_labels", "relabel run/wsss/labels"): f"labels: 1 of 8 .*{FIRST}",
    ("make_debiased_labels", "retrain_features"): "features: 1 of 1 .*first checkpoint",
    ("make_debiased_labels", "move"): DONE,
    ("make_debiased_labels", "--wsss.epochs=2"): "python train_wsss.py, with the same --config",
    ("make_debiased_labels", "--debias.alpha=0.3"): "debias.alpha: 0.4 there, 0.3 now",
    ("make_debiased_labels", "--debias.nearest=3"): DONE,
    ("make_debiased_labels", "--uss.cache=true"): DONE,
    ("train_segmentation", "rename_tag"): f"wsss, which this stage reads, {STALE}.*label 1 is",
    ("train_segmentation", "retag"): f"wsss, which this stage reads, {STALE}.*tags: 1 of 8",
    ("train_segmentation", "repaint"): f"{STALE}.*images: 1 of 8 have another content",
    ("train_segmentation", "relabel run/wsss/labels"): f"debias, which this stage reads, {STALE}",
    ("train_segmentation", "relabel run/debias/labels"): f"labels: 1 of 8 .*{FIRST}",
    ("train_segmentation", "retrain_features"): f"debias, which this stage reads, {STALE}",
    ("train_segmentation", "move"): DONE,
    ("train_segmentation", "--segmentation.rates=[1,2]"): r"rates: \[2, 4\] there, \[1, 2\] now",
    ("train_segmentation", "--wsss.seam.second_scale=0.4"): DONE,
    ("evaluate", "rename_tag"): "label 1 is 'disc' there, 'square' now",
    ("evaluate", "retag"): "(?s)mIoU.*warning.*tags: 1 of 8 differ",
    ("evaluate", "repaint"): "(?s)mIoU.*warning.*images: 1 of 8 have another content",
    ("evaluate", "repaint p09"): "images: 1 of 4 have another content, first p09",
    ("evaluate", "relabel run/debias/labels"): "(?s)mIoU.*warning.*labels: 1 of 8",
    ("evaluate", "move"): DONE,
    ("evaluate", "--segmentation.rates=[1,2]"): r"rates: \[2, 4\] there, \[1, 2\] now",
    ("evaluate", "--segmentation.output_stride=16"): "output_stride: 8 there, 16 now",
    ("evaluate", "--segmentation.train_scales=[0.5]"): r"train_scales: \[\] there, \[0.5\] now",
    ("evaluate", "--segmentation.backbone.dilation=delayed"): "'torchvision' there, 'delayed' now",
    ("evaluate", "--evaluation.flip=false"): "evaluation.flip: True there, False now",
    ("evaluate", "--evaluation.crf.iterations=3"): DONE,  # without refinement
}


def outcome(call, capsys) -> str:
    """What was said; a refusal's message."""
    try:
        call()
    except UserError as error:
        return str(error)
    said = capsys.readouterr()
    return said.out + said.err


@pytest.mark.parametrize(("script", "change"), CASES)
def test_one_changed_thing_is_noticed_where_it_counts(finished, tmp_path, capsys, script, change):
    world, options = finished.copy(tmp_path), []
    if change.startswith("--"):
        options = [change]
    else:
        name, *arguments = change.split()
        getattr(world, name)(*arguments)
    before = {p: p.read_bytes() for p in world.run.rglob("*.p[nt][gh]")}
    said = outcome(lambda: world.call(script, *options), capsys)
    assert re.search(CASES[script, change], said, re.DOTALL), said
    assert {p: p.read_bytes() for p in world.run.rglob("*.p[nt][gh]")} == before  # nothing is lost


def test_changed_mask_changes_the_score_and_nothing_else(finished, tmp_path, capsys):
    world = finished.copy(tmp_path)
    path = world.run / "evaluation/mars/scores.json"
    before = json.loads(path.read_text())
    world.relabel("photos/masks", "p09")
    assert DONE in outcome(lambda: world.call("evaluate"), capsys)
    after = json.loads(path.read_text())
    assert after["confusion_matrix"] != before["confusion_matrix"]
    assert after["data"]["masks"]["sha256"] != before["data"]["masks"]["sha256"]
    assert after["predictions"]["sha256"] == before["predictions"]["sha256"]
    assert after["data"]["list"] == "val" and after["made_from"]["classes"] == ["disc", "square"]


def test_changed_feature_file_of_somebody_else_is_noticed(finished, tmp_path, capsys):
    world, features = finished.copy(tmp_path), tmp_path / "features"
    features.mkdir()
    rng = np.random.default_rng(0)
    for k in range(8):
        np.save(features / f"p{k:02}.npy", rng.normal(size=(4, 6, 7)).astype(np.float32))
    options = (f"--uss.features_dir={features}", f"--debias.output_dir={tmp_path / 'ours'}")
    world.call("make_debiased_labels", *options)
    assert DONE in outcome(lambda: world.call("make_debiased_labels", *options), capsys)
    np.save(features / "p03.npy", rng.normal(size=(4, 6, 7)).astype(np.float32))
    said = outcome(lambda: world.call("make_debiased_labels", *options), capsys)
    assert "features: 1 of 8 have another content, first p03" in said
    for change in ("--uss.whiten=2", "--uss.centre=true"):  # of the files as they are read
        said = outcome(lambda c=change: world.call("make_debiased_labels", *options, c), capsys)
        key, value = change.removeprefix("--").split("=")
        assert re.search(f"{key}: \\w+ there, {value.title()} now", said), said


def test_plain_training_depends_on_tags_if_they_decide_how_often_images_are_drawn(finished):
    for balance, there in ((0, False), (0.5, True)):
        options = ["--segmentation.mode=wsss", f"--segmentation.class_balance={balance}"]
        config, _ = parse(make_parser("x", ""), [f"--config={finished.folder}/tiny.yaml", *options])
        split = read_split(config.data, "train")
        assert ("tags" in segmentation_identity(config, split, split.images).inputs) == there


def test_features_are_kept_on_disk_when_that_is_asked_for_later(finished, tmp_path, capsys):
    world = finished.copy(tmp_path)
    assert DONE in outcome(lambda: world.call("train_uss", "--uss.cache=true"), capsys)
    assert len(list((world.run / "uss/features").glob("*.npy"))) == 8
    said = outcome(lambda: world.call("make_debiased_labels", "--uss.cache=true"), capsys)
    assert DONE in said


def test_labels_of_other_classes_are_refused_wherever_they_are(finished, tmp_path, capsys):
    world, elsewhere = finished.copy(tmp_path), tmp_path / "elsewhere"
    shutil.copytree(world.run / "wsss/labels", elsewhere)
    world.rename_tag()
    labels = f"--wsss.labels_dir={elsewhere}"
    for script, option in (
        ("make_debiased_labels", labels),
        ("train_segmentation", f"--segmentation.labels_dir={elsewhere}"),
        ("evaluate", f"--predictions={elsewhere}"),
    ):
        said = outcome(lambda s=script, o=option: world.call(s, o, "--run_dir=new"), capsys)
        assert "label 1 is 'disc' there, 'square' now" in said, script


def test_photographs_to_predict_may_be_added_but_not_changed(finished, tmp_path, capsys):
    world = finished.copy(tmp_path)
    (world.photos / "tags.csv").unlink()  # nothing of the training data is needed
    shutil.copy(world.photos / "p05.png", world.folder / "others")
    world.predict()
    assert len(list((world.folder / "results/labels").glob("*.png"))) == 3
    signature = json.loads((world.folder / "results/labels/made_from.json").read_text())
    assert signature["classes"] == ["disc", "square"]
    manifest = json.loads((world.folder / "results/manifest.json").read_text())
    assert manifest["finished"] and manifest["results"] == {"images": 3}
    shutil.copy(world.photos / "p04.png", world.folder / "others/p00.png")
    assert "images: 1 of 3 have another content, first p00" in outcome(world.predict, capsys)
    (world.folder / "results/labels/p00.png").unlink()  # of one that is broken, there is none yet
    world.predict()
    assert (world.folder / "results/labels/p00.png").exists()


def test_checkpoint_of_another_stage_is_named(finished, tmp_path, capsys):
    world = finished.copy(tmp_path)
    path = world.run / "segmentation/mars/checkpoint.pth"
    shutil.copy(world.run / "uss/checkpoint.pth", path)
    said = outcome(lambda: world.call("evaluate"), capsys)
    assert "is the checkpoint of stage 1, USS; here one of segmentation is needed" in said
    said = outcome(lambda: world.predict("--weights", str(path)), capsys)
    assert "is the checkpoint of stage 1, USS; here one of segmentation is needed" in said


def test_network_is_what_its_checkpoint_says_whatever_is_configured(finished, tmp_path):
    world = finished.copy(tmp_path)
    shutil.rmtree(world.folder / "results")
    world.predict("--segmentation.rates=[1,2]", "--segmentation.aspp_dim=99")
    ours, theirs = (w.folder / "results/labels/p00.png" for w in (world, finished))
    assert ours.read_bytes() == theirs.read_bytes()


def test_photograph_that_cannot_be_read_is_left_out_by_choice(finished, tmp_path, capsys):
    world = finished.copy(tmp_path)
    (world.folder / "others/p02.png").write_bytes(b"no picture")
    assert "p02.png cannot be decoded" in outcome(world.predict, capsys)
    world.predict("--data.on_bad_image=skip")
    assert "1 of 3 images are skipped" in capsys.readouterr().err
    manifest = json.loads((world.folder / "results/manifest.json").read_text())
    assert manifest["skipped"] == ["p02"] and manifest["results"] == {"images": 2}


def test_scores_of_one_folder_never_replace_those_of_another(finished, tmp_path, capsys):
    world = finished.copy(tmp_path)
    folders = [world.folder / f"{name}/labels" for name in ("a/x", "b/x")]
    for folder in folders:
        shutil.copytree(world.photos / "masks", folder)
    write_label(folders[1] / "p09.png", 0 * read_label(folders[1] / "p09.png"))
    first, second = ([f"--predictions={folder}"] for folder in folders)
    world.call("evaluate", *first)
    world.call("evaluate", *first)
    assert "give these scores a --name" in outcome(lambda: world.call("evaluate", *second), capsys)
    said = outcome(lambda: world.call("evaluate", *first, "--split=train"), capsys)
    assert "holds scores on the list val, these are on train" in said
    said = outcome(lambda: world.call("evaluate", *first, "--name=mars"), capsys)
    assert "is the evaluation of a trained network" in said
    world.call("evaluate", *second, "--name=second")


def test_training_images_are_scored_in_a_folder_of_their_own(finished, tmp_path):
    world = finished.copy(tmp_path)
    world.call("evaluate", "--split=train")
    scores = [
        json.loads((world.run / f"evaluation/{name}/scores.json").read_text())
        for name in ("mars", "mars_train")
    ]
    assert [s["data"]["list"] for s in scores] == ["val", "train"]
    assert [s["data"]["masks"]["count"] for s in scores] == [4, 8]


def test_export_of_another_network_is_refused_in_the_same_folder(finished, tmp_path, capsys):
    world, output = finished.copy(tmp_path), f"--output={tmp_path / 'exported'}"
    world.call("tools.export_features", output)
    before = {p.name: p.read_bytes() for p in (tmp_path / "exported").glob("*.npy")}
    world.call("tools.export_features", output)
    world.retrain_features()
    said = outcome(lambda: world.call("tools.export_features", output), capsys)
    assert "network: 1 of 1 have another content, first checkpoint" in said and len(before) == 8
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "exported").glob("*.npy")}


def test_best_threshold_is_sought_among_maps_of_these_tags(finished, tmp_path, capsys):
    world = finished.copy(tmp_path)
    world.call("tools.demo.sweep_threshold")
    signature = json.loads((world.run / "wsss/labels_best/made_from.json").read_text())
    best = json.loads((world.run / "wsss/threshold_sweep.json").read_text())["chosen"]
    assert signature["classes"] == ["disc", "square"]
    assert signature["settings"]["wsss.threshold"] == best
    world.retag()
    assert "tags: 1 of 8 differ" in outcome(
        lambda: world.call("tools.demo.sweep_threshold"), capsys
    )


def test_results_name_their_classes(finished):
    for name in ("wsss/labels", "wsss/cams", "debias/labels", "evaluation/mars/predictions"):
        signature = json.loads((finished.run / name / "made_from.json").read_text())
        assert signature["classes"] == ["disc", "square"] and signature["inputs"], name
    for name in ("uss", "wsss", "segmentation/mars"):
        content = checkpoint.load(finished.run / name / "checkpoint.pth")
        assert content["made_from"]["classes"] == ["disc", "square"]
    with np.load(finished.run / "debias/centroids.npz") as file:
        assert json.loads(str(file["made_from"]))["classes"] == ["disc", "square"]


def test_manifests_hold_the_keys_of_the_chosen_methods_alone(finished):
    chosen = {
        "uss": {
            "method",
            "backbone",
            "backbone_stage",
            "tokens",
            "scales",
            "flip",
            "centre",
            "whiten",
        },
        "wsss": {"object_share", "crf", "epochs", "backbone", "irn", "threshold"},
        "debias": {"alpha", "cut", "scale", "crf", "nearest"},
    }
    unused = {
        "uss": set(),
        "wsss": {"crf", "irn", "threshold"},
        "debias": {"crf", "nearest", "scale"},
    }
    for name, keys in chosen.items():
        settings = json.loads((finished.run / name / "manifest.json").read_text())["settings"]
        found = {key.split(".")[1] for key in settings if key.startswith(f"{name}.")}
        assert found & keys == keys - unused[name]
    settings = json.loads((finished.run / "uss/manifest.json").read_text())["settings"]
    assert {key.split(".")[1] for key in settings if "." in key} == chosen["uss"]
