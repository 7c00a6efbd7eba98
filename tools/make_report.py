"""Makes one self-contained page of pictures, tables and charts from what a run has written so far.

    python tools/make_report.py --config configs/demo.yaml [--summary]

Reads <run_dir> (manifests, scores, logs, labels, checkpoints) and the data set's images; writes
<run_dir>/report.html, which needs no network. What has no files is left out, and the page says what
to run for it. `--summary` also prints the scores. Ground truth is shown and compared with, only.
"""

import io
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.config import Config, make_parser, parse
from core.debias import debiased_score
from core.errors import UserError, run_script
from core.features import feature_source
from core.files import read_arrays, read_json, written_whole
from core.labels import BACKGROUND, BIASED_ON_DISK, IGNORE, palette, read_label
from core.pages import data_url, templates
from core.runs import Run
from core.segmenter import predict
from core.splits import Split, ground_truth, label_files, read_split
from core.training import autocast, pick_device

LABEL_ROWS = {  # evaluation name: title, meaning
    "labels_wsss": ("WSSS pseudo labels", "the classifier's maps at the configured threshold"),
    "labels_wsss_best": ("WSSS labels, best threshold", "the same, best threshold in hindsight"),
    "labels_debias": ("Debiased labels", "biased pixels count as background here"),
}
LABEL_MAKERS = {
    "labels_wsss": "train_wsss.py",
    "labels_wsss_best": "tools/sweep_threshold.py",
    "labels_debias": "make_debiased_labels.py",
}
MODE_ROWS = {
    "wsss": ("WSSS", "trained on the pseudo labels as they are"),
    "wsss_best": ("WSSS, best threshold", "trained on the best labels that a threshold can give"),
    "ignore": ("Ignore", "biased pixels are left out of the loss"),
    "complement": ("Complement", "the teacher fills biased pixels"),
    "mars": ("MARS", "filled, and weighted by the teacher's certainty"),
    "supervised": ("Fully supervised", "trained on ground truth: the upper bound"),
}
COLUMNS = {"miou": max, "fp": min, "fn": min, "biased": max, "others": max}  # which value is best
COMPARED = ("wsss_best", "mars", "supervised")
LOGS = {
    "uss/self_supervised": "Stage 1: features",
    "uss/stego": "Stage 1: STEGO head",
    "wsss": "Stage 2: classifier",
    **{f"segmentation/{mode}": f"Stage 4: {title}" for mode, (title, _) in MODE_ROWS.items()},
}
SIDE = 192  # pixels, longest side of a picture on the page
IMAGES_PER_CLASS, MOST_IMAGES = 2, 40
HATCH = (90, 0, 90)  # second colour of biased pixels
OUTLINE = (255, 255, 255)


def main() -> None:
    parser = make_parser("tools/make_report.py", __doc__)
    parser.add_argument("--summary", action="store_true", help="Print the scores, too.")
    config, options = parse(parser)
    arguments = [a for a in sys.argv[1:] if a != "--summary"]
    path = write_report(config, arguments)
    if options.summary:
        print_summary(config, Commands(config, arguments))
    print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB); open it in a browser")


def write_report(config: Config, arguments: Sequence[str]) -> Path:
    """Writes the page of the configured run.

    Args:
        config: the experiment.
        arguments: the command line that names it, repeated in the commands that the page suggests.

    Raises:
        UserError: there is no run folder.
    """
    run = Run(config)
    if not run.folder.is_dir():
        raise UserError(f"{run.folder} is missing; run the stages first, or set run_dir")
    record, commands = read_record(run.folder), Commands(config, arguments)
    page = {
        "config": config,
        "per_class": IMAGES_PER_CLASS,
        "compared": {name: MODE_ROWS[name][0] for name in COMPARED},
        "headline": headline(record.scores, config),
        "groups": score_table(record.scores, config, commands),
        "training": training_gallery(config, commands),
        "validation": validation_gallery(config, commands),
        "legend": {name: palette()[c] for c, name in enumerate(config.data.classes, 1)},
        "bars": class_bars(record.scores, config),
        "threshold": sweep_chart(record.sweep),
        "curves": training_curves(record.logs),
        "environment": merged({k: m["environment"] for k, m in record.manifests.items()}),
        "settings": merged({k: m["settings"] for k, m in record.manifests.items()}),
        "commands": commands,
        **asdict(record),
    }
    jinja = templates(Path(__file__).parent)
    jinja.filters |= {"percent": percent, "points": points, "duration": duration}
    path = run.folder / "report.html"
    with written_whole(path) as aside:
        aside.write_text(jinja.get_template("report.html.j2").render(page), "utf-8")
    return path


def print_summary(config: Config, commands: "Commands") -> None:
    """The table of scores for a terminal, in per cent."""
    scores = read_record(Path(config.run_dir)).scores
    print(f"{'':30}{'mIoU':>7}{'FP':>7}{'FN':>7}{'biased':>8}{'others':>8}  images")
    for group in score_table(scores, config, commands):
        for row in group["rows"]:
            miou, fp, fn, biased, others = map(percent, row["values"].values())
            line = f"{row['title']:30}{miou:>7}{fp:>7}{fn:>7}{biased:>8}{others:>8}"
            print(f"{line}  {row['images']['scored']}/{row['images']['of']} {group['list']}")


# What the run has written.


@dataclass
class Record:
    """Figures found in a run folder; whatever is absent is empty."""

    scores: dict[str, dict] = field(default_factory=dict)  # by evaluation name
    manifests: dict[str, dict] = field(default_factory=dict)  # by folder below the run
    logs: dict[str, list[dict]] = field(default_factory=dict)  # by folder below the run
    sweep: dict = field(default_factory=dict)
    analysis: dict = field(default_factory=dict)


def read_record(folder: Path) -> Record:
    record = Record()
    for name in (*LABEL_ROWS, *MODE_ROWS):
        record.scores[name] = _read(folder / "evaluation" / name / "scores.json")
    stages = ["uss", "wsss", "debias", "control/debias"]
    stages += [f"{part}/{mode}" for part in ("segmentation", "evaluation") for mode in MODE_ROWS]
    for stage in stages:
        record.manifests[stage] = _read(folder / stage / "manifest.json")
    for stage in LOGS:
        record.logs[stage] = _read_log(folder / stage / "log.jsonl")
    record.scores, record.manifests, record.logs = (
        {k: v for k, v in found.items() if v}
        for found in (record.scores, record.manifests, record.logs)
    )
    record.sweep = _read(folder / "wsss" / "threshold_sweep.json")
    record.analysis = _read(folder / "analysis.json")
    return record


def _read(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def _read_log(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is no training log ({error}); move it away") from None


class Commands:
    """The next command towards a missing part of this run."""

    def __init__(self, config: Config, arguments: Sequence[str]):
        self._run, self._arguments = Run(config), shlex.join(arguments)
        self._labels = {
            "labels_wsss": self._run.wsss_labels,
            "labels_wsss_best": self._run.wsss / "labels_best",
            "labels_debias": self._run.debias / "labels",
        }

    def __call__(self, script: str, *options: str) -> str:
        return " ".join(filter(None, ("python", script, self._arguments, shlex.join(options))))

    def score(self, name: str) -> str:
        """Towards evaluation/<name>/scores.json: the labels, the training or the scoring itself."""
        labels = "labels_wsss_best" if name == "wsss_best" else name
        folder = self._labels.get(labels)
        if folder is not None and not folder.is_dir():
            return self(LABEL_MAKERS[labels])
        if name in LABEL_ROWS:
            options = ["--predictions", str(folder), "--split", "train", "--name", name]
            return self("evaluate.py", *options)
        options = ["--segmentation.mode", name]
        if name == "wsss_best":
            options = ["--segmentation.mode", "wsss", "--segmentation.name", name]
            options += ["--segmentation.labels_dir", str(folder)]
        trained = (self._run.segmentation(name) / "checkpoint.pth").is_file()
        return self("evaluate.py" if trained else "train_segmentation.py", *options)


# Figures.


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference in percentage points, with a true minus sign."""
    return f"{100 * value:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def figures(score: dict, biased: Sequence[str]) -> dict[str, float | None]:
    """One row of the table: mIoU, FP, FN, and the mean IoU of either kind of class, 0..1."""
    iou = list(zip(score["classes"], score["per_class"]["iou"], strict=True))[1:]
    return {
        **{key: score[key] for key in ("miou", "fp", "fn")},
        "biased": mean(v for name, v in iou if name in biased),
        "others": mean(v for name, v in iou if name not in biased),
    }


def headline(scores: Mapping[str, dict], config: Config) -> dict | None:
    """What the page says first, before and after; None without scores of plain labels and MARS."""
    before = "wsss_best" if "wsss_best" in scores else "wsss"
    if "mars" not in scores or before not in scores:
        return None
    chosen = {"before": before, "mars": "mars", "supervised": "supervised"}
    rows = {
        key: figures(scores[name], config.data.biased_classes)
        for key, name in chosen.items()
        if name in scores and scores[name]["miou"] is not None
    }
    if not {"before", "mars"} <= set(rows):
        return None
    low, value = rows["before"]["miou"], rows["mars"]["miou"]
    gain = round(value, 3) - round(low, 3)  # of the figures as printed
    high = rows.get("supervised", {}).get("miou")
    counts = {json.dumps(scores[name]["images"]) for name in chosen.values() if name in scores}
    images = scores["mars"]["images"]
    return {
        **rows,
        "title": MODE_ROWS[before][0],
        "best_case": before == "wsss_best",
        "gain": gain,
        "better": gain > 1e-9,
        "closed": (value - low) / (high - low) if high is not None and high > low else None,
        "images": images["scored"],
        "comparable": len(counts) == 1 and _complete(images),
    }


def score_table(scores: Mapping[str, dict], config: Config, commands: Commands) -> list[dict]:
    """Label maps of the training list, then predictions of the validation list."""
    groups = []
    kinds = {
        "Label maps": (LABEL_ROWS, config.data.train_list or "train"),
        "Predictions": (MODE_ROWS, config.data.val_list or "val"),
    }
    for kind, (titles, ids) in kinds.items():
        rows = [
            {
                "name": name,
                "title": title,
                "meaning": meaning,
                "values": figures(scores[name], config.data.biased_classes),
                "images": scores[name]["images"],
                "best": set(),
            }
            for name, (title, meaning) in titles.items()
            if name in scores
        ]
        rivals = [r for r in rows if r["name"] != "supervised" and _complete(r["images"])]
        for key, choose_best in COLUMNS.items():
            known = [r for r in rivals if r["values"][key] is not None]
            best = choose_best((r["values"][key] for r in known), default=None)
            for row in known if len(known) > 1 else ():
                row["best"] |= {key} if row["values"][key] == best else set()
        wanted = titles.keys() - ({"wsss"} if "wsss_best" in scores else set())
        missing = [(titles[n][0], commands.score(n)) for n in titles if n in wanted - scores.keys()]
        groups.append({"kind": kind, "list": ids, "rows": rows, "missing": missing})
    return groups


def _complete(images: Mapping[str, int]) -> bool:
    return images["scored"] == images["of"]


def class_bars(scores: Mapping[str, dict], config: Config) -> list[dict]:
    """IoU on the validation list by class, biased classes first in a group of their own."""
    iou = {
        name: dict(zip(scores[name]["classes"], scores[name]["per_class"]["iou"], strict=True))
        for name in COMPARED
        if name in scores
    }
    biased = [c for c in config.data.classes if c in config.data.biased_classes]
    others = [c for c in config.data.classes if c not in biased]
    groups = {"Biased classes": biased, "Other classes" if biased else "Classes": others}
    return [
        {"title": title, "rows": [(c, [(n, v.get(c)) for n, v in iou.items()]) for c in classes]}
        for title, classes in groups.items()
        if classes and iou
    ]


def merged(trees: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each key with its value or, where stages differ, every value and the stages that have it."""
    values: dict[str, dict[str, list[str]]] = {}
    for stage, tree in trees.items():
        for key, value in _flat(tree).items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            values.setdefault(key, {}).setdefault(text, []).append(stage)
    return [
        (key, [(text, ", ".join(names) if len(found) > 1 else "") for text, names in found.items()])
        for key, found in values.items()
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


# Charts: polylines in a box of fixed size, which the template draws as SVG.

LEFT, TOP, WIDTH, HEIGHT = 48, 18, 262, 140


def chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, list[tuple[float, float]]],
    marks: Sequence[tuple[float, str]] = (),
) -> dict | None:
    """Scales series of (x, y), and the x of vertical marks, into the box; None without a point."""
    series = {name: line for name, line in series.items() if line}
    everything = [p for line in series.values() for p in line]
    if not everything:
        return None
    xs, ys = zip(*everything, strict=True)
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1])

    def x_at(x: float) -> float:
        return round(LEFT + WIDTH * (x - x_low) / (x_high - x_low), 1)

    def y_at(y: float) -> float:
        return round(TOP + HEIGHT * (y_high - y) / (y_high - y_low), 1)

    ends = (f"{name} from {line[0][1]:.3g} to {line[-1][1]:.3g}" for name, line in series.items())
    return {
        "title": title,
        "labels": (x_label, y_label),
        "lines": {
            name: " ".join(f"{x_at(x)},{y_at(y)}" for x, y in line) for name, line in series.items()
        },
        "x_ticks": [(x_at(t), f"{t:g}") for t in x_ticks if x_low <= t <= x_high],
        "y_ticks": [(y_at(t), f"{t:g}") for t in y_ticks],
        "marks": [(x_at(x), text) for x, text in marks if x_low <= x <= x_high],
        "summary": f"{title}: {'; '.join(ends)}",  # for those who cannot see it
    }


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round values that enclose [low, high]."""
    span = max(high - low, 1e-6, 1e-3 * abs(high))
    raw = span / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]


def sweep_chart(sweep: Mapping[str, Any]) -> dict | None:
    names = {"miou": "mIoU", "biased": "biased classes", "unbiased": "other classes"}
    rows = sweep.get("scores", [])
    series = {
        text: [(r["threshold"], 100 * r[key]) for r in rows if r.get(key) is not None]
        for key, text in names.items()
    }
    same = sweep.get("chosen") == sweep.get("configured")
    marks = [(sweep["chosen"], "best")] if sweep else []
    marks += [] if same else [(sweep["configured"], "configured")]
    return chart("Pseudo labels", "threshold", "IoU, %", series, sorted(marks))


def training_curves(logs: Mapping[str, list[dict]]) -> list[dict]:
    """The loss of every training and, for MARS, how it fills biased pixels."""
    charts = []
    for stage, entries in logs.items():
        charts.append(chart(LOGS[stage], "iteration", "loss", {"loss": _series(entries, "loss")}))
        filled = {
            "filled with an object": _series(entries, "filled_object"),
            "certainty": _series(entries, "certainty"),
        }
        if stage == "segmentation/mars":
            charts.append(chart("MARS: biased pixels", "iteration", "share", filled))
    return [c for c in charts if c]


def _series(entries: list[dict], key: str) -> list[tuple[float, float]]:
    return [(e["iteration"], e[key]) for e in entries if e.get(key) is not None]


# Pictures.

Column = tuple[str, Callable[[Split, Sequence[int]], Sequence[Path | np.ndarray]]]
"""The command that makes a column's files, and how to get it for some images of a list."""


@dataclass
class Gallery:
    strips: list[dict] = field(default_factory=list)  # one per image, as the template reads them
    notes: list[tuple[str, str, str]] = field(default_factory=list)  # what, why, command
    cut: bool = False  # more classes than MOST_IMAGES allows

    def attempt(self, what: str, command: str, read: Callable, *arguments: Any) -> Any:
        """The result of `read`, or None and a note of what is left out, why, and what makes it."""
        try:
            return read(*arguments)
        except UserError as error:
            self.notes.append((what, str(error).splitlines()[0], command))
            return None


def choose(split: Split, per_class: int = IMAGES_PER_CLASS) -> dict[int, tuple[list[int], bool]]:
    """The first images of the list for every class.

    Returns:
        index -> the classes, 0-based, that it was chosen for; whether it is the first of a class.
    """
    chosen: dict[int, tuple[list[int], bool]] = {}
    for rank in range(per_class):
        for c in range(split.tags.shape[1]):
            having = np.flatnonzero(split.tags[:, c])
            if rank < len(having):
                chosen.setdefault(int(having[rank]), ([], rank == 0))[0].append(c)
    return chosen


def part(split: Split, indices: Sequence[int]) -> Split:
    ids, images = ([values[k] for k in indices] for values in (split.ids, split.images))
    return Split(tuple(ids), tuple(images), split.tags[list(indices)])


def training_gallery(config: Config, commands: Commands) -> Gallery:
    """How labels change: image, truth, pseudo label, similarity, debiased label, predictions."""
    run = Run(config)
    stage_3 = commands("make_debiased_labels.py")
    columns = {
        "Ground truth": ("", lambda s, k: ground_truth(config.data, part(s, k))),
        "Pseudo label": (
            commands("train_wsss.py"),
            lambda s, k: label_files(run.wsss_labels, part(s, k), "run stage 2"),
        ),
        "Similarity": (stage_3, lambda s, k: similarity(config, s, k)),
        "Debiased label": (
            stage_3,
            lambda s, k: label_files(run.debias / "labels", part(s, k), "run stage 3"),
        ),
    }
    plain = "wsss_best" if _weights(run, "wsss_best").is_file() else "wsss"
    for mode, title in ((plain, "Network, plain labels"), ("mars", "Network, MARS")):
        columns[title] = (
            commands.score(mode),
            lambda s, k, mode=mode: predictions(config, _weights(run, mode), part(s, k)),
        )
    return make_gallery(config, "train", columns)


def validation_gallery(config: Config, commands: Commands) -> Gallery:
    """What the trained networks predict on images that they have not seen."""
    run = Run(config)
    columns = {"Ground truth": ("", lambda s, k: ground_truth(config.data, part(s, k)))}
    for mode in COMPARED:
        folder = run.evaluation(mode) / "predictions"
        columns[MODE_ROWS[mode][0]] = (
            commands.score(mode),
            lambda s, k, folder=folder: label_files(folder, part(s, k), "score this network"),
        )
    return make_gallery(config, "val", columns)


def _weights(run: Run, mode: str) -> Path:
    return run.segmentation(mode) / "checkpoint.pth"


def make_gallery(config: Config, which: str, columns: Mapping[str, Column]) -> Gallery:
    """A strip for each chosen image of a list, with a panel for each column that has its files."""
    gallery = Gallery()
    split = gallery.attempt("Pictures", "", read_split, config.data, which)
    if split is None:
        return gallery
    chosen = choose(split)
    indices = list(chosen)[:MOST_IMAGES]
    gallery.cut = len(chosen) > len(indices)
    contents = {
        caption: gallery.attempt(caption, command, read, split, indices)
        for caption, (command, read) in columns.items()
    }
    names = np.array(config.data.classes)
    for k, index in enumerate(indices):
        image_id, photo = split.ids[index], shrink(split.read_image(index), cv2.INTER_AREA)
        classes, first = chosen[index]
        panels = [
            panel(caption, content[k], config.data.classes)
            for caption, content in contents.items()
            if content is not None
        ]
        strip = {"id": image_id, "chosen_for": ", ".join(names[classes]), "first": first}
        strip |= {"tags": ", ".join(names[split.tags[index]]), "panels": panels}
        strip["photo"] = data_uri(Image.fromarray(photo), "JPEG", quality=88)
        strip["ratio"] = f"{photo.shape[1]} / {photo.shape[0]}"
        gallery.strips.append(strip)
    return gallery


def panel(caption: str, content: Path | np.ndarray, names: Sequence[str]) -> dict[str, str]:
    """One picture of a strip: an overlay of a uint8 label map, or a map of a float32 similarity."""
    if isinstance(content, Path):
        content = read_label(content, len(names))
    if content.dtype == np.uint8:
        kind, picture, alt = "overlay", overlay(content), describe(content, names)
    else:
        kind, picture, alt = "map", heat(content), f"{content.min():.2f} to {content.max():.2f}"
    return {"caption": caption, "kind": kind, "src": data_uri(picture), "alt": f"{caption}: {alt}"}


def describe(label: np.ndarray, names: Sequence[str]) -> str:
    """Alternative text: the share of the image that each label covers."""
    titles = dict(enumerate(names, 1)) | {BIASED_ON_DISK: "biased", IGNORE: "ignored"}
    shares = np.bincount(label.ravel(), minlength=256) / label.size
    told = [f"{title} {shares[v]:.0%}" for v, title in titles.items() if shares[v] > 0]
    return ", ".join(told) or "background only"


def similarity(config: Config, split: Split, indices: Sequence[int]) -> list[np.ndarray]:
    """Eq. 4 for a few images: (h, w) float32 in [0, 1] each, at the size of the page's pictures."""
    path = Run(config).debias / "centroids.npz"
    arrays = read_arrays(path, ("centroids",), "run make_debiased_labels.py")
    centroids = torch.from_numpy(arrays["centroids"])
    device = pick_device(config)
    source = feature_source(config, split, device, autocast(config, device))
    maps = []
    for index, feat in source(indices):
        if centroids.shape != (len(config.data.classes), len(feat)):
            raise UserError(
                f"{path} holds centroids {tuple(centroids.shape)}, expected one row of "
                f"{len(feat)} for each of {len(config.data.classes)} classes"
            )
        score = debiased_score(feat, centroids, torch.from_numpy(split.tags[index]))
        size = shrink(split.read_image(index), cv2.INTER_AREA).shape[:2]
        maps.append(F.interpolate(score[None, None], size, mode="bilinear")[0, 0].numpy())
    return maps


def predictions(config: Config, weights: Path, split: Split) -> list[np.ndarray]:
    """(H, W) labels that a trained network gives a few images, by the settings of evaluate.py."""
    with tempfile.TemporaryDirectory() as folder:
        predict(config, weights, split, Path(folder))
        return [read_label(Path(folder) / f"{i}.png") for i in split.ids]


def shrink(image: np.ndarray, interpolation: int) -> np.ndarray:
    """Scales an image or label map down so that its longest side is at most SIDE pixels."""
    height, width = image.shape[:2]
    scale = min(1, SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return image if scale == 1 else cv2.resize(image, size, interpolation=interpolation)


def overlay(label: np.ndarray) -> Image.Image:
    """(H, W) uint8 labels -> their colours, outlined; clear: background, hatched: biased."""
    label = shrink(label, cv2.INTER_NEAREST)
    colours = palette()[label]
    y, x = np.indices(label.shape)
    colours[(label == BIASED_ON_DISK) & ((x + y) // 3 % 2 == 1)] = HATCH
    near = np.stack([np.roll(np.pad(label, 1, "edge"), s, a) for a in (0, 1) for s in (-1, 1)])
    colours[(near[:, 1:-1, 1:-1] != label).any(0) & (label < BIASED_ON_DISK)] = OUTLINE
    alpha = np.where(label == BACKGROUND, 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([colours, alpha]))


def heat(score: np.ndarray) -> Image.Image:
    """(H, W) in [0, 1] -> viridis."""
    colours = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_VIRIDIS)
    levels = (score.clip(0, 1) * 63 + 0.5).astype(np.uint8) * 4  # 64 steps compress well
    image = Image.fromarray(levels)
    image.putpalette(np.ascontiguousarray(colours[:, 0, ::-1]).tobytes())
    return image


def data_uri(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **options)
    return data_url(buffer.getvalue(), kind.lower())


if __name__ == "__main__":
    run_script(main)
