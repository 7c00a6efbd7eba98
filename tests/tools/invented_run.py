"""A run folder with everything in it that the report shows, made up in a moment."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import yaml
from PIL import Image

from core.config import Config, make_parser, parse
from core.cut import BINS, find_cuts
from core.data.labels import BIASED_ON_DISK, read_label, write_label
from core.data.lists import ground_truth, read_split
from core.data.settings import DataConfig
from core.metrics import confusion_matrix, summarise
from core.models.deeplab import build_deeplab
from core.pipeline import Run, own_stages
from core.run import checkpoint
from core.run.files import read_json, write_json
from core.run.inputs import save_stamps, stamp, summary
from core.run.stage import environment
from tools.common import ROOT
from tools.common.jobs import Job
from tools.common.titles import MODES
from tools.data import make_demo_dataset
from tools.data.demo_world.scene import CLASSES
from tools.report.record import LOGS

NAMES = tuple(c.name for c in CLASSES)
BIASED = sum(c.context is not None for c in CLASSES)  # these come first
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


def make_run(folder: Path, names: tuple[str, ...] = NAMES) -> list[str]:
    """Draws a data set and makes up all files of a finished run.

    Args:
        folder: where data set, run and configuration go.
        names: what the classes are called; the first four are biased.

    Returns:
        The report's arguments.
    """
    draw_dataset(folder / "data", names, train=12, val=6)
    settings = {
        "run_dir": str(folder / "run"),
        "workers": 0,
        "data": {"root": str(folder / "data"), "classes": names, "biased_classes": names[:BIASED]},
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
    weights = {"ema": build_deeplab(config.segmentation, len(names)).state_dict()}
    for mode in ("wsss_best", "mars"):
        checkpoint.save(run.segmentation(mode) / "checkpoint.pth", weights)
    return ["--config", str(path)]


def draw_dataset(root: Path, names: tuple[str, ...], train: int, val: int) -> None:
    for part, (name, count) in enumerate({"train": train, "val": val}.items()):
        ids = [f"{name}_{n:05d}" for n in range(count)]
        for n, image_id in enumerate(ids):
            make_demo_dataset._write(n, image_id, root=root, seed=(0, part), corpus=False)
        for path in (root / "Annotations").glob("*.xml"):
            xml = path.read_text("utf-8")
            for old, new in zip(NAMES, names, strict=True):
                xml = xml.replace(f"<name>{old}</name>", f"<name>{escape(new)}</name>")
            path.write_text(xml, "utf-8")
        (root / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(ids))


def invent_labels(config: Config, run: Run) -> None:
    """Label maps and predictions whose errors are shifts of the truth and slabs of context."""
    root, rng, names = Path(config.data.root), np.random.default_rng(0), config.data.classes
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
            label = np.where(context & (main <= BIASED), main, moved).astype(np.uint8)
            if name == "labels_debias":
                label[(label > 0) & (truth == 0)] = BIASED_ON_DISK
            folder = folders.get(name, run.evaluation(name) / "predictions")
            write_label(folder / f"{image_id}.png", label)
            matrix = matrix + confusion_matrix(label, truth, len(names))
        scores = summarise(matrix, names, len(split), len(split))
        which = "train" if name.startswith("labels") else "val"
        scores["data"] = {"split": which, "list": which, "biased_classes": names[:BIASED]}
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


def perfect_features(config_path: Path, data: Path, label: Callable) -> Path:
    """Features that say what every cell shows, and labels, for the experiment of a tiny config.

    Args:
        config_path: configuration file, which is changed to read both.
        data: folder of the data set.
        label: function from a mask (H, W) and an image's class, 1..C, to its pseudo label.
    """
    split = read_split(DataConfig(root=str(data), classes=NAMES), "train")
    folder = config_path.parent
    (folder / "features").mkdir()
    for index, path in enumerate(ground_truth(DataConfig(root=str(data), classes=NAMES), split)):
        mask = read_label(path, len(NAMES))
        cells = mask[2::4, 2::4]
        feat = np.eye(256, dtype=np.float32)[cells].transpose(2, 0, 1)[:9]
        feat[0, cells == 255] = 1
        np.save(folder / f"features/{split.ids[index]}.npy", feat)
        main = split.tags[index].nonzero()[0][0] + 1
        write_label(folder / f"labels/{split.ids[index]}.png", label(mask, main))
    settings = yaml.safe_load(config_path.read_text())
    settings["uss"]["features_dir"] = str(folder / "features")
    settings["wsss"]["labels_dir"] = str(folder / "labels")
    config_path.write_text(yaml.safe_dump(settings))
    return config_path


def invent_figures(config: Config, run: Run) -> None:
    """Manifests, logs, sweep and analyses."""
    stages = ["uss", "wsss", "debias"]
    stages += [f"{p}/{m}" for p in ("segmentation", "evaluation") for m in MODES]
    for k, stage in enumerate(stages):
        manifest = {
            "stage": f"stage {k}, {stage}",
            "finished": True,
            "seconds": 300.0 / (k + 1),
            "results": {},
        }
        manifest["settings"] = {
            "seed": 0,
            "segmentation.mode": stage[13:],
        }
        manifest["classes"] = config.data.classes
        manifest |= {"inputs": {}, "environment": environment(config)}
        write_json(run.folder / stage / "manifest.json", manifest)
    split = read_split(config.data, "train")
    for folder, identity, _ in own_stages(config, split, "wsss", "debias"):
        stamps = stamp(identity.inputs, ())
        identified = {"settings": dict(identity.settings), "inputs": summary(stamps)}
        write_json(folder / "manifest.json", read_json(folder / "manifest.json") | identified)
        save_stamps(folder, stamps, 0)
    rng = np.random.default_rng(0)
    invent_cuts(run.debias, config.data.classes)
    for stage in LOGS:
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
    table = {"classes": dict.fromkeys(config.data.classes, removed), **means}
    analysis = {"removal": table, "control": table}
    analysis["selection"] = {
        "classes": dict.fromkeys(config.data.classes, chosen),
        "mean_selected": 0.93,
    }
    analysis["selection"]["mean_all"] = 0.55
    write_json(run.folder / "analysis.json", analysis)
    invent_analyses(run.folder / "analysis")


def invent_cuts(folder: Path, classes: Sequence[str]) -> None:
    """What stage 3 decided: the first class is left as it is, the second loses nearly all."""
    cells = np.exp(-(((np.linspace(-1, 1, BINS) - np.array([[0.2], [0], [0.4]])) / 0.1) ** 2))
    counts = np.stack([np.round(100 * cells).astype(np.int64)] * len(classes))
    counts[0] = counts[0, 0]
    np.savez(folder / "cuts.npz", counts=counts, **find_cuts(counts))
    manifest = read_json(folder / "manifest.json")
    warning = {"problem": "stage 3 removed nearly all labels", "remedy": "Use other features"}
    manifest["results"] = {
        "removed": [0.0, 0.95, *[0.3] * (len(classes) - 2)],
        "warnings": [{**warning, "classes": {classes[1]: "95%"}}],
    }
    write_json(folder / "manifest.json", manifest)


def invent_analyses(folder: Path) -> None:
    """One with a figure and one without, the second by name the first by order."""
    folder.mkdir()
    Image.new("RGB", (320, 160), (200, 220, 240)).save(folder / "shares.png")
    common = {"caption": "What was measured.", "command": "python tools/some.py"}
    common |= {"columns": ["setting", "mIoU, %"], "rows": [["a", 61.23456], ["b < c", 60]]}
    write_json(folder / "a.json", {**common, "title": "Last", "figure": None, "order": 2})
    write_json(folder / "b.json", {**common, "title": "First", "figure": "shares.png", "order": 1})


def check_order(jobs: Sequence[Job]) -> None:
    """Each job comes after those it depends on; its script and configurations exist."""
    seen = set()
    for job in jobs:
        assert seen.issuperset(job.depends_on) and job.name not in seen, job.name
        configs = [a.removeprefix("--config=") for a in job.command if a.startswith("--config=")]
        assert all((ROOT / name).is_file() for name in (job.command[0], *configs))
        seen.add(job.name)
