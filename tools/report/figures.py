"""The page's numbers: the headline, the table of scores, IoU by class, settings."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from core.config import Config
from tools.common.titles import LABELS, MODES
from tools.report.record import COMPARED, TRAINING_ROWS, Commands

PAIRS = (  # the most telling differences between evaluations on one list
    ("mars", "wsss_best"),
    ("mars", "wsss"),
    ("labels_debias", "labels_wsss_best"),
    ("labels_debias", "labels_wsss"),
)
COLUMNS = {
    "miou": max,
    "fp": min,
    "fn": min,
    "biased": max,
    "others": max,
}


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
    """One row of the table, in 0..1: mIoU, FP, FN, and the mean IoU of biased and other classes."""
    iou = list(zip(score["classes"], score["per_class"]["iou"], strict=True))[1:]
    return {
        **{key: score[key] for key in ("miou", "fp", "fn")},
        "biased": mean(v for name, v in iou if name in biased),
        "others": mean(v for name, v in iou if name not in biased),
    }


def headline(scores: Mapping[str, dict], config: Config) -> dict | None:
    """The comparison before and after MARS; None unless plain labels and MARS have scores."""
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
    gain = round(value, 3) - round(low, 3)  # between the figures as printed
    high = rows.get("supervised", {}).get("miou")
    counts = {
        json.dumps([scores[name]["images"], scores[name].get("data", {}).get("masks")])
        for name in chosen.values()
        if name in scores
    }
    images = scores["mars"]["images"]
    return {
        **rows,
        "title": MODES[before][0],
        "best_case": before == "wsss_best",
        "gain": gain,
        "better": gain > 1e-9,
        "closed": (value - low) / (high - low) if high is not None and high > low else None,
        "images": images["scored"],
        "comparable": len(counts) == 1 and _complete(images),
    }


def kinds_of(scores: Mapping[str, dict]) -> dict[str, dict[str, tuple[str, str]]]:
    """Evaluations by kind, each with title and meaning; unknown names form their own kind."""
    kinds = {
        "Label maps": LABELS,
        "Predictions": MODES,
        "Predictions of training images, as in the paper's Table 6": TRAINING_ROWS,
    }
    known = {name for rows in kinds.values() for name in rows}
    others = {name: (name, "named by the user") for name in scores if name not in known}
    return kinds | {"Other evaluations": others}


def score_table(scores: Mapping[str, dict], config: Config, commands: Commands) -> list[dict]:
    """One row for each evaluation, and the commands for missing ones."""
    groups = []
    lists = {
        "Label maps": config.data.train_list or "train",
        "Predictions": config.data.val_list or "val",
    }
    for kind, titles in kinds_of(scores).items():
        ids = lists.get(kind)  # None: any list
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
        rivals = rivals if ids else []
        for key, choose_best in COLUMNS.items():
            known = [r for r in rivals if r["values"][key] is not None]
            best = choose_best((r["values"][key] for r in known), default=None)
            for row in known if len(known) > 1 else ():
                row["best"] |= {key} if row["values"][key] == best else set()
        wanted = titles.keys() - ({"wsss"} if "wsss_best" in scores else set()) if ids else set()
        missing = [(titles[n][0], commands.score(n)) for n in titles if n in wanted - scores.keys()]
        groups.append({"kind": kind, "list": ids, "rows": rows, "missing": missing})
    return groups


def _complete(images: Mapping[str, int]) -> bool:
    return images["scored"] == images["of"]


def class_table(scores: Mapping[str, dict]) -> dict[str, Any]:
    """IoU of every class, background included, in every evaluation.

    Returns:
        runs: name, title and kind of each evaluation, and whether its column is shown at first.
        rows: by class and evaluation, the IoU in 0..1, or None.
        pair: the two evaluations whose difference is shown at first; None if there are fewer.
    """
    iou = {
        name: dict(zip(score["classes"], score["per_class"]["iou"], strict=True))
        for name, score in scores.items()
    }
    names = [name for titles in kinds_of(scores).values() for name in titles if name in scores]
    pairs = (*PAIRS, tuple(names[:2]))
    pair = next((p for p in pairs if len(p) == 2 and scores.keys() >= {*p}), None)
    shown = {*COMPARED, *(pair or names)}
    runs = [
        {"name": name, "title": title, "kind": kind, "shown": name in shown}
        for kind, titles in kinds_of(scores).items()
        for name, (title, _) in titles.items()
        if name in scores
    ]
    classes = dict.fromkeys(c for values in iou.values() for c in values)
    return {
        "runs": runs,
        "rows": {c: {name: values.get(c) for name, values in iou.items()} for c in classes},
        "pair": pair,
    }


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
