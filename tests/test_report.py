"""The report on a run folder that these tests make up: what it says, and what it leaves out."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from core import checkpoint
from core.config import Config, make_parser, parse
from core.errors import UserError
from core.files import write_json
from core.labels import BIASED_ON_DISK, read_label, write_label
from core.metrics import confusion_matrix
from core.models.deeplab import segmenter
from core.runs import Run, environment
from core.scoring import summarise
from core.splits import Split, read_split
from tools import make_demo_dataset, make_report
from tools.demo_world.scene import CLASSES

NAMES = tuple(c.name for c in CLASSES)
BIASED = tuple(c.name for c in CLASSES if c.context)
SHARE_OF_ERROR = {  # evaluation name -> pixels moved along, share of context that stays
    "labels_wsss": (3, 1.0),
    "labels_wsss_best": (4, 0.8),
    "labels_debias": (3, 0.2),
    "wsss": (4, 0.9),
    "wsss_best": (4, 0.6),
    "ignore": (4, 0.4),
    "complement": (3, 0.3),
    "mars": (3, 0.2),
    "supervised": (1, 0.0),
}


def make_run(folder: Path, train: int = 12, val: int = 6) -> list[str]:
    """Draws a data set and makes up all files of a finished run; returns the report's arguments."""
    draw_dataset(folder / "data", train, val)
    settings = {
        "run_dir": str(folder / "run"),
        "workers": 0,
        "data": {"root": str(folder / "data"), "classes": NAMES, "biased_classes": BIASED},
        "uss": {"features_dir": str(folder / "features")},
        "segmentation": {
            "backbone": {
                "name": "resnet18",
                "arguments": {"channels": [8, 8, 8, 8], "stem_width": 8},
                "weights": "none",
            },
            "aspp_dim": 8,
            "low_dim": 8,
            "rates": [2],
        },
        "evaluation": {"scales": [1.0], "flip": False, "refine": "none"},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    config, _ = parse(make_parser("test", ""), ["--config", str(path)])
    run = Run(config)
    invent_labels(config, run)
    invent_features(config, run, folder / "features")
    invent_figures(config, run)
    weights = {"ema": segmenter(config.segmentation, len(NAMES)).state_dict()}
    for mode in ("wsss_best", "mars"):
        checkpoint.save(run.segmentation(mode) / "checkpoint.pth", weights)
    return ["--config", str(path)]


def draw_dataset(root: Path, train: int, val: int) -> None:
    for part, (name, count) in enumerate({"train": train, "val": val}.items()):
        ids = [f"{name}_{n:05d}" for n in range(count)]
        for n, image_id in enumerate(ids):
            make_demo_dataset._write(n, image_id, root=root, seed=(0, part), corpus=False)
        (root / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(ids))


def invent_labels(config: Config, run: Run) -> None:
    """Label maps and predictions whose errors are shifts of the truth and slabs of context."""
    root, rng = Path(config.data.root), np.random.default_rng(0)
    folders = {"labels_wsss": run.wsss / "labels", "labels_wsss_best": run.wsss / "labels_best"}
    folders["labels_debias"] = run.debias / "labels"
    for name, (shift, share) in SHARE_OF_ERROR.items():
        split = read_split(config.data, "train" if name.startswith("labels") else "val")
        matrix = 0
        for image_id in split.ids:
            truth = read_label(root / "SegmentationClass" / f"{image_id}.png")
            stuff = read_label(root / "StuffClass" / f"{image_id}.png")
            moved = np.roll(truth, shift, (0, 1))
            main = int(np.bincount(moved.ravel(), minlength=9)[1:].argmax()) + 1
            context = (stuff == stuff[-20, 64]) & (moved == 0) & (np.arange(128)[:, None] > 70)
            context &= rng.random() < share
            label = np.where(context & (main <= len(BIASED)), main, moved).astype(np.uint8)
            if name == "labels_debias":
                label[(label > 0) & (truth == 0)] = BIASED_ON_DISK
            folder = folders.get(name, run.evaluation(name) / "predictions")
            write_label(folder / f"{image_id}.png", label)
            matrix = matrix + confusion_matrix(label, truth, len(NAMES))
        scores = summarise(matrix, NAMES, len(split), len(split))
        write_json(run.evaluation(name) / "scores.json", scores)


def invent_features(config: Config, run: Run, folder: Path) -> None:
    """Features that tell class and texture of each cell, and the centroids of the classes."""
    root, rng = Path(config.data.root), np.random.default_rng(0)
    folder.mkdir()
    for image_id in read_split(config.data, "train").ids:
        truth = read_label(root / "SegmentationClass" / f"{image_id}.png")[4::8, 4::8]
        one_hot = (truth == np.arange(9)[:, None, None]).astype(np.float32)
        np.save(folder / f"{image_id}.npy", one_hot + rng.normal(0.2, 0.15, one_hot.shape))
    run.debias.mkdir(exist_ok=True)
    np.savez(run.debias / "centroids.npz", centroids=np.eye(9, dtype=np.float32)[1:])


def invent_figures(config: Config, run: Run) -> None:
    """Manifests, logs, sweep and analysis."""
    stages = ["uss", "wsss", "debias"]
    stages += [f"{p}/{m}" for p in ("segmentation", "evaluation") for m in make_report.MODE_ROWS]
    for k, stage in enumerate(stages):
        manifest = {
            "stage": f"stage {k}, {stage}",
            "finished": True,
            "seconds": 300.0 / (k + 1),
            "results": {},
        }
        manifest["settings"] = {"seed": 0, "data.classes": NAMES, "segmentation.mode": stage[13:]}
        manifest |= {"inputs": {}, "environment": environment(config)}
        write_json(run.folder / stage / "manifest.json", manifest)
    rng = np.random.default_rng(0)
    for stage in make_report.LOGS:
        entries = []
        for t in range(8, 201, 8):
            noise = rng.normal(0, 0.03)
            entry = {"iteration": t, "loss": round(0.2 + 1.5 * np.exp(-t / 50) + noise, 4)}
            if stage.endswith("mars"):
                entry |= {"filled_object": 0.6 - t / 500, "certainty": 0.3 + t / 400 + noise}
            entries.append(json.dumps(entry))
        (run.folder / stage).mkdir(parents=True, exist_ok=True)
        (run.folder / stage / "log.jsonl").write_text("\n".join(entries) + "\n")
    rows = [
        {
            "threshold": t,
            "miou": 0.6 - (t - 0.35) ** 2,
            "biased": 0.3 + t / 3,
            "unbiased": 0.8 - t / 3,
        }
        for t in (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6)
    ]
    sweep = {"scores": rows, "chosen": 0.35, "configured": 0.3, "images": 3, "note": "for the test"}
    write_json(run.wsss / "threshold_sweep.json", sweep)
    chosen = {
        "target_share_selected": 0.93,
        "target_share_all": 0.55,
        "selected": 4,
        "centroids": 10,
    }
    removed = {"context_removed": 0.8, "object_kept": 0.9, "precision": None}
    means = {"mean_biased": removed, "mean_unbiased": removed}
    table = {"classes": dict.fromkeys(NAMES, removed), **means}
    analysis = {"removal": table, "control": table}
    analysis["selection"] = {"classes": dict.fromkeys(NAMES, chosen), "mean_selected": 0.93}
    analysis["selection"]["mean_all"] = 0.55
    write_json(run.folder / "analysis.json", analysis)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Config, list[str], str]:
    """A finished run, the arguments of its report, and the page."""
    arguments = make_run(tmp_path_factory.mktemp("report"))
    config, _ = parse(make_parser("test", ""), arguments)
    path = make_report.write_report(config, arguments)
    return config, arguments, path.read_text("utf-8")


class Reader(HTMLParser):
    """Checks that tags are closed in order; collects visible text and what attributes refer to."""

    VOID = {"meta", "img", "input", "br", "line", "polyline", "colgroup"}

    def __init__(self, html: str):
        super().__init__()
        self.open, self.text, self.references, self.tags = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.references += [v for k, v in attributes if k in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def test_page_is_one_well_formed_file_without_network(finished):
    _, _, html = finished
    page = Reader(html)
    assert page.open == []
    assert all(r.startswith(("data:image/", "#")) for r in page.references)
    assert not re.search(r"https?://|@import", html)
    assert len(html) < 6e6
    assert all(a["alt"] for tag, a in page.tags if tag == "img")


def test_every_part_of_a_finished_run_is_on_the_page(finished):
    _, _, html = finished
    words = Reader(html).words
    assert "Not in this run" not in words
    for titles in (make_report.LABEL_ROWS, make_report.MODE_ROWS):
        assert all(title in words for title, _ in titles.values())
    assert "MARS raises mIoU" in words
    for part in ("Similarity", "Network, MARS", "Control, classifier features", "certainty"):
        assert part in words


def test_headline_figures_are_those_of_the_score_files(finished):
    config, _, html = finished
    names = ("wsss_best", "mars", "supervised")
    miou = [
        json.loads((Run(config).evaluation(n) / "scores.json").read_text())["miou"] for n in names
    ]
    low, value, high = miou
    words = Reader(html).words
    assert f"from {100 * low:.1f} to {100 * value:.1f} %" in words
    assert f"{100 * (value - low) / (high - low):.0f} % of the gap" in words


def test_headline_is_plain_when_mars_is_not_better(finished):
    config, _, _ = finished
    scores = make_report.read_record(Run(config).folder).scores
    scores = {**scores, "mars": scores["wsss"], "wsss_best": scores["mars"]}
    found = make_report.headline(scores, config)
    assert not found["better"] and found["gain"] < 0 and found["closed"] < 0
    same = make_report.headline({**scores, "mars": scores["wsss_best"]}, config)
    assert not same["better"]


def test_missing_parts_name_the_command_that_makes_them(tmp_path):
    (tmp_path / "run").mkdir()
    config = Config(run_dir=str(tmp_path / "run"))
    config.data.root = str(tmp_path / "none")
    path = make_report.write_report(config, ["--config", "my own.yaml"])
    page = Reader(path.read_text("utf-8"))
    assert page.open == []
    ours = "--config 'my own.yaml'"
    assert f"python train_wsss.py {ours}" in page.words
    assert f"python train_segmentation.py {ours} --segmentation.mode mars" in page.words
    assert f"python tools/sweep_threshold.py {ours}" in page.words
    assert "MARS raises" not in page.words


def test_missing_run_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="run_dir"):
        make_report.write_report(Config(run_dir=str(tmp_path / "none")), [])


def test_names_cannot_inject_html(tmp_path):
    folder = tmp_path / "<script>alert(1)<"
    folder.mkdir()
    path = make_report.write_report(Config(run_dir=str(folder)), [])
    assert "<script>alert" not in path.read_text("utf-8")


def test_best_value_is_never_that_of_full_supervision(finished):
    config, arguments, _ = finished
    record = make_report.read_record(Run(config).folder)
    commands = make_report.Commands(config, arguments)
    labels, predictions = make_report.score_table(record.scores, config, commands)
    best = {row["name"] for row in predictions["rows"] if "miou" in row["best"]}
    weak = {n: record.scores[n]["miou"] for n in make_report.MODE_ROWS if n != "supervised"}
    assert best == {max(weak, key=weak.get)}
    assert record.scores["supervised"]["miou"] > max(weak.values())
    assert labels["list"] == "train" and predictions["list"] == "val"


def test_score_on_part_of_the_images_is_never_best(finished):
    config, arguments, _ = finished
    scores = make_report.read_record(Run(config).folder).scores
    part = {**scores["mars"], "miou": 0.99, "images": {"scored": 5, "of": 6}}
    commands = make_report.Commands(config, arguments)
    _, predictions = make_report.score_table({**scores, "mars": part}, config, commands)
    row = next(row for row in predictions["rows"] if row["name"] == "mars")
    assert "miou" not in row["best"]
    assert not make_report.headline({**scores, "mars": part}, config)["comparable"]


def test_images_are_the_first_of_each_class_shown_once():
    tags = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 1, 0]], bool)
    ids = ("a", "b", "c", "d")
    chosen = make_report.choose(Split(ids, tuple(map(Path, ids)), tags), per_class=2)
    assert chosen == {0: ([0], True), 1: ([1, 0], True), 2: ([1], False)}


def test_overlay_is_clear_on_background_and_hatched_on_biased():
    label = np.zeros((12, 12), np.uint8)
    label[:, 6:] = BIASED_ON_DISK
    pixels = np.array(make_report.overlay(label))
    assert (pixels[:, :6, 3] == 0).all() and (pixels[:, 6:, 3] == 255).all()
    colours = {tuple(int(v) for v in p) for p in pixels[:, 6:, :3].reshape(-1, 3)}
    assert colours == {(255, 0, 255), make_report.HATCH}


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 0.1), (1e-4, 2e-4), (5, 5), (0, 0), (1, 800)])
def test_ticks_enclose_the_values_in_a_few_round_steps(low, high):
    found = make_report.ticks(low, high)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9
    assert 2 <= len(found) <= 7


def test_chart_puts_the_extremes_at_the_edges_of_the_box():
    lines = {"loss": [(0, 0.0), (10, 1.0)], "none": []}
    drawn = make_report.chart("t", "x", "y", lines)
    left, top = make_report.LEFT, make_report.TOP
    right, bottom = left + make_report.WIDTH, top + make_report.HEIGHT
    assert drawn["lines"] == {"loss": f"{left:.1f},{bottom:.1f} {right:.1f},{top:.1f}"}
    assert make_report.chart("t", "x", "y", {"none": []}) is None


def test_settings_that_differ_name_their_stages():
    rows = make_report.merged({"a": {"k": 1, "s": {"t": "x"}}, "b": {"k": 2, "s": {"t": "x"}}})
    assert rows == [("k", [("1", "a"), ("2", "b")]), ("s.t", [("x", "")])]


def test_similarity_refuses_centroids_of_other_features(finished):
    config, _, _ = finished
    split = read_split(config.data, "train")
    features = torch.zeros(5, 4, 4).numpy()
    path = Path(config.uss.features_dir) / f"{split.ids[0]}.npy"
    kept = path.read_bytes()
    try:
        np.save(path, features)
        with pytest.raises(UserError, match="one row of 5"):
            make_report.similarity(config, split, [0])
    finally:
        path.write_bytes(kept)


@pytest.mark.parametrize(
    "seconds, text",
    [(3.14, "3.1 s"), (125, "2 min 05 s"), (3599.9, "1 h 00 min"), (7260, "2 h 01 min")],
)
def test_durations_are_told_in_words(seconds, text):
    assert make_report.duration(seconds) == text
