"""The study on photographs: feature kinds for one set of defaults, and tables over all seeds."""

import csv
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from core.config import Config
from core.data.labels import inspect_label, read_label
from core.data.lists import Split, ground_truth, read_split
from core.metrics import Scores, confusion_matrix, scores
from core.run.files import read_json
from core.run.threads import in_threads
from tools.common.jobs import Job
from tools.common.titles import LABELS, MODES
from tools.paper.published import closed_gap
from tools.paper.results import NONE, Analysis, spread

FEW = 100  # training photographs; classes with fewer are called rare
DEMO_VIT = (
    '--uss.backbone={"name": "vit_tiny_patch16_224", "arguments": {"img_size": 128, '
    '"patch_size": 8, "embed_dim": 160, "depth": 6, "num_heads": 4}, '
    '"weights": "data/demo/features.safetensors"}'
)
AS_THEY_ARE = "--uss.whiten=null"
FEATURES = {  # title, arguments; all over the configuration, which whitens
    "whitened": ("EfficientNet-Lite0, whitened (the default)", ()),
    "raw": ("EfficientNet-Lite0, as they are", (AS_THEY_ARE,)),
    "centred": ("EfficientNet-Lite0, mean removed", (AS_THEY_ARE, "--uss.centre=true")),
    "stego": (
        "STEGO on EfficientNet-Lite0",
        (AS_THEY_ARE, "--uss.method=stego", "--uss.iterations=600"),
    ),
    "demo": (
        "the demo's ViT, trained on drawings",
        (DEMO_VIT, "--uss.scales=[0.5]", AS_THEY_ARE, "--uss.centre=true"),
    ),
    "leopart": (
        "Leopart on the demo's ViT",
        (
            DEMO_VIT,
            "--uss.scales=[0.5]",
            AS_THEY_ARE,
            "--uss.centre=true",
            "--config=configs/demo_leopart.yaml",
        ),
    ),
    "random": (
        "control: EfficientNet-Lite0, random weights, whitened",
        ("--uss.backbone.weights=none",),
    ),
    "classifier": ("control: the classifier's own, whitened", ()),
}
TRAINED_WITH = ("random", "classifier")  # controls with which MARS is trained, too
COLUMNS = ("wsss_best", "ignore", "complement", "mars", "supervised")


def feature_jobs(settings: Sequence[str], run_dir: Path) -> list[Job]:
    """Stage 3 with each kind of features on the experiment's labels, and MARS with the controls.

    Args:
        settings: arguments of the experiment's stages.
        run_dir: folder of the experiment.
    """
    jobs = []
    for kind, (_, changes) in FEATURES.items():
        if kind == "whitened":
            continue
        folder = run_dir / "features" / kind
        own = [
            *settings,
            *changes,
            f"--run_dir={folder}",
            f"--wsss.labels_dir={run_dir}/wsss/labels",
        ]
        commands = {"features": ["train_uss.py", *own]}
        after = "stage 2: classifier, pseudo labels"
        if kind == "classifier":
            own.append(f"--uss.features_dir={run_dir}/control/features")
            commands, after = {}, "control: classifier features"
        commands["debias"] = ["make_debiased_labels.py", *own]
        labels = [f"--predictions={folder}/debias/labels", "--split=train", "--name=labels_debias"]
        commands["scores"] = ["evaluate.py", *own, *labels]
        if kind in TRAINED_WITH:
            commands["train"] = ["train_segmentation.py", *own]
            commands["score"] = ["evaluate.py", *own]
        for stage, command in commands.items():
            jobs.append(Job(f"{kind}: {stage}", command, (after,)))
            after = jobs[-1].name
    return jobs


def unseen(split: Split) -> list[int]:
    """Two thirds of the images; settings may be chosen on the others, a third by MD5 of the id."""
    digests = [
        int(hashlib.md5(i.encode(), usedforsecurity=False).hexdigest(), 16) for i in split.ids
    ]
    return [k for k, digest in enumerate(digests) if digest % 3]


def label_scores(config: Config, folder: Path) -> Scores:
    """Scores of training labels on the `unseen` photographs; biased pixels count as background."""
    split, size = read_split(config.data, "train"), len(config.data.classes)
    masks, chosen = ground_truth(config.data, split), unseen(split)

    def count(k: int) -> np.ndarray:
        label = read_label(folder / f"{split.ids[k]}.png", size)
        truth, _ = inspect_label(masks[k], size, biased=False)
        return confusion_matrix(label, truth, size)

    return scores(sum(in_threads(count, chosen, 1, "scoring", len(chosen))))


def groups(config: Config) -> dict[str, list[int]]:
    """Labels of the groups of classes that are averaged."""
    counts = read_split(config.data, "train").tags.sum(0)
    every = range(1, 1 + len(counts))
    known = {1 + config.data.classes.index(name) for name in config.data.biased_classes}
    found = {
        "all, with background": [0, *every],
        "biased classes": sorted(known),
        f"classes of {FEW} training photographs or more": [
            c for c in every if counts[c - 1] >= FEW
        ],
        "rarer classes": [c for c in every if counts[c - 1] < FEW],
    }
    return {name: chosen for name, chosen in found.items() if chosen}


def by_class(config: Config, columns: Mapping[str, Sequence[np.ndarray]]) -> list[list]:
    """A row for each class and group: its name, and each column over the runs, per cent.

    Args:
        config: class names and groups.
        columns: title -> for each run (1 + C,) values, background first.
    """
    counts = read_split(config.data, "train").tags.sum(0)
    names = [
        "background",
        *(f"{n} ({k})" for n, k in zip(config.data.classes, counts, strict=True)),
    ]
    rows = {**{name: [k] for k, name in enumerate(names)}, **groups(config)}

    def cell(runs: Sequence[np.ndarray], chosen: list[int]) -> float | str:
        values = np.array([run[chosen] for run in runs])
        return spread(100 * np.nanmean(values, 1)) if np.isfinite(values).any(1).all() else NONE

    return [
        [name, *(cell(runs, chosen) for runs in columns.values())] for name, chosen in rows.items()
    ]


def labels_table(configs: Sequence[Config], run_dirs: Sequence[Path]) -> Analysis:
    """Pseudo labels before and after stage 3."""
    folders = {"labels_wsss": "wsss/labels", "labels_wsss_best": "wsss/labels_best"}
    folders["labels_debias"] = "debias/labels"
    columns = {}
    for name, folder in folders.items():
        found = [label_scores(c, run / folder) for c, run in zip(configs, run_dirs, strict=True)]
        for key, title in {"iou": "IoU", "fp": "FP", "fn": "FN"}.items():
            if name != "labels_wsss_best" or key == "iou":
                columns[f"{LABELS[name][0]}: {title}"] = [getattr(s, key) for s in found]
    caption = (
        "Labels on the training photographs on which no setting was chosen, per cent; classes with "
        "their number of training photographs. IoU of the group of all is mIoU; FP and FN are "
        "shares of the union."
    )
    rows = by_class(configs[0], columns)
    return Analysis("labels", 20, "Labels by class", caption, ["class", *columns], rows)


def segmenters_table(configs: Sequence[Config], run_dirs: Sequence[Path]) -> Analysis:
    """IoU of the segmenters on the validation list."""
    found = {name: [evaluation(run, name) for run in run_dirs] for name in COLUMNS}
    columns = {MODES[name][0]: [s.iou for s in found[name]] for name in COLUMNS}
    pairs = zip(found["mars"], found["wsss_best"], strict=True)
    columns["gain of MARS"] = [mars.iou - plain.iou for mars, plain in pairs]
    columns |= {f"{MODES[n][0]}: FP": [s.fp for s in found[n]] for n in ("wsss_best", "mars")}
    rows = by_class(configs[0], columns)
    base, mars, full = (
        100 * np.array([s.miou for s in found[name]])
        for name in ("wsss_best", "mars", "supervised")
    )
    caption = (
        "IoU on the validation list, per cent; classes with their number of training photographs. "
        f"MARS closes {closed_gap(base, mars, full)} % of the gap between plain training at the "
        "best threshold and full supervision."
    )
    return Analysis("segmenters", 21, "Segmenters by class", caption, ["class", *columns], rows)


def features_table(configs: Sequence[Config], run_dirs: Sequence[Path]) -> Analysis:
    """The same settings of stage 3 on every kind of features."""

    def row(title: str, folder: Callable[[Path], Path], mars: str | None) -> list:
        found = [label_scores(c, folder(run)) for c, run in zip(configs, run_dirs, strict=True)]
        means = [[s.miou, s.mean(s.fp), s.mean(s.fn)] for s in found]
        cells = [spread(100 * column) for column in np.array(means).T]
        manifests = [read_json(folder(run).parent / "manifest.json")["results"] for run in run_dirs]
        values = np.array([m.get("tag_auc", np.nan) for m in manifests], float)  # null becomes nan
        known = np.isfinite(values).any()
        cells.append(spread(100 * np.nanmedian(values, -1)) if known else NONE)
        if mars is None:
            return [title, *cells, NONE]
        trained = [evaluation(run / mars, "mars").miou for run in run_dirs]
        return [title, *cells, spread(100 * np.array(trained))]

    rows = [row("none: the labels as they are", lambda run: run / "wsss/labels", None)]
    for kind, (title, _) in FEATURES.items():
        own = "" if kind == "whitened" else f"features/{kind}"
        mars = own if kind in ("whitened", *TRAINED_WITH) else None
        rows.append(row(title, lambda run, own=own: run / own / "debias/labels", mars))
    caption = (
        "Labels after stage 3, with the same settings for all features, on the training "
        "photographs on which no setting was chosen; tag AUC, the median over the classes of how "
        "well the debiased centroid tells photographs with the class from others; and MARS trained "
        "on the labels, on the validation list; per cent."
    )
    columns = ["features", "mIoU of labels", "FP", "FN", "tag AUC", "MARS, mIoU"]
    return Analysis("features", 40, "One setting, many features", caption, columns, rows)


def audit_table(configs: Sequence[Config], run_dirs: Sequence[Path]) -> Analysis:
    """Whether the audit, which sees no masks, ranks classes as their true false positives do."""
    rows = []
    for config, run in zip(configs, run_dirs, strict=True):
        with (run / "debias/audit.csv").open(newline="", encoding="utf-8") as file:
            found = {line["name"]: line for line in csv.DictReader(file)}
        truth = evaluation(run, "labels_wsss").fp[1:]
        row = [config.seed]
        for key in ("score", "removed"):
            values = np.array([float(found[name][key]) for name in config.data.classes])
            row.append(round(rank_correlation(values, truth), 2))
        rows.append(row)
    caption = (
        "Rank correlation (Spearman) over the classes between a figure of the audit, made without "
        "masks, and the true share of false positives in the labels before stage 3."
    )
    columns = ["seed", "bias score", "share removed"]
    return Analysis("audit", 95, "The audit against masks", caption, columns, rows)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's coefficient of two (n,) arrays; equal values share their mean rank."""

    def ranks(values: np.ndarray) -> np.ndarray:
        below = (values[:, None] > values).sum(1) + (values[:, None] >= values).sum(1)
        return below / 2

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def evaluation(run_dir: Path, name: str) -> Scores:
    """Scores of one evaluation of a run."""
    found = read_json(run_dir / "evaluation" / name / "scores.json")
    return scores(np.array(found["confusion_matrix"]))
