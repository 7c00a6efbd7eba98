"""What a run has written so far, and the commands that make the missing parts."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config import Config
from core.pipeline import Run
from core.run.errors import UserError
from core.run.files import read_json
from tools.common.titles import LABELS, MODES
from tools.report.analyses import Analysis, read_analyses

LABEL_MAKERS = {
    "labels_wsss": "train_wsss.py",
    "labels_wsss_best": "tools/demo/sweep_threshold.py",
    "labels_debias": "make_debiased_labels.py",
}
TRAINING_ROWS = {
    f"{mode}_train": (f"{title}, training images", why) for mode, (title, why) in MODES.items()
}
COMPARED = (
    "wsss_best",
    "mars",
    "supervised",
)  # shown first; the page names the command if one is missing
LOGS = {
    "uss/self_supervised": "Stage 1: features",
    "uss/stego": "Stage 1: STEGO head",
    "wsss": "Stage 2: classifier",
    **{f"segmentation/{mode}": f"Stage 4: {title}" for mode, (title, _) in MODES.items()},
}


@dataclass
class Record:
    """The files found in a run folder; fields without a file are empty."""

    scores: dict[str, dict] = field(default_factory=dict)  # by evaluation name
    manifests: dict[str, dict] = field(default_factory=dict)  # by folder below the run
    logs: dict[str, list[dict]] = field(default_factory=dict)  # by folder below the run
    sweep: dict = field(default_factory=dict)
    analysis: dict = field(default_factory=dict)
    analyses: list[Analysis] = field(default_factory=list)


def read_record(folder: Path) -> Record:
    """Reads the run folder.

    Raises:
        UserError: a file does not have its stage's or tool's format.
    """
    record = Record()
    own_names = sorted(p.parent.name for p in folder.glob("evaluation/*/scores.json"))
    for name in dict.fromkeys((*LABELS, *MODES, *own_names)):
        scores = _read(folder / "evaluation" / name / "scores.json")
        record.scores[_name(name, scores)] = scores
    stages = ["uss", "wsss", "debias", "control/debias"]
    stages += [f"{part}/{mode}" for part in ("segmentation", "evaluation") for mode in MODES]
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
    record.analyses = read_analyses(folder / "analysis")
    return record


def _name(name: str, scores: Mapping[str, Any]) -> str:
    """The name of an evaluation, with the list unless it is the usual one."""
    usual = "val" if name in MODES else "train" if {name} & {*LABELS, *TRAINING_ROWS} else None
    data = scores.get("data", {})
    there = data.get("split", usual)
    return name if usual in (None, there) else f"{name}, on the list {data['list'] or there}"


def _read(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def _read_log(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is not a training log ({error}); move it away") from None


class Commands:
    """The next command on the way to a missing part of this run."""

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
        """The next step to evaluation/<name>/scores.json: labels, training or scoring."""
        labels = "labels_wsss_best" if name == "wsss_best" else name
        folder = self._labels.get(labels)
        if folder is not None and not folder.is_dir():
            return self(LABEL_MAKERS[labels])
        if name in LABELS:
            options = ["--predictions", str(folder), "--split", "train", "--name", name]
            return self("evaluate.py", *options)
        options = ["--segmentation.mode", name]
        if name == "wsss_best":
            options = ["--segmentation.mode", "wsss", "--segmentation.name", name]
            options += ["--segmentation.labels_dir", str(folder)]
        trained = (self._run.segmentation(name) / "checkpoint.pth").is_file()
        return self("evaluate.py" if trained else "train_segmentation.py", *options)
