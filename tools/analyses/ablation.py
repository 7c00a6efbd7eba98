"""Table 6: what filling biased pixels and weighting them by certainty bring."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from core.config import Config
from core.data.lists import list_name
from core.jobs import Job, run_jobs
from core.pipeline import Run
from core.run.files import read_json
from tools.analyses.results import NONE, Analysis, paper, percent

MODES = {
    "wsss": "plain training on the pseudo labels",
    "ignore": "biased pixels left out",
    "complement": "biased pixels complemented",
    "mars": "complemented, weighted by certainty (MARS)",
    "supervised": "ground truth",
}
METRICS = ("miou", "fp", "fn")
CAPTION = (
    "Segmenters trained alike, all but the last on the same pseudo labels, scored on training "
    "images, as in the paper, and on the validation list; per cent. FP and FN are shares of the "
    "union, mean over the classes. The row without complementing is not in the paper."
)


def table6(
    config: Config,
    arguments: Sequence[str],
    listed: str | None,
    max_parallel: int,
    beside: str | None,
    masks: str | None = None,
) -> Analysis:
    """Trains and scores the modes that are not there yet.

    Args:
        config: of a run whose stage 3 is finished.
        arguments: the command line that gives `config`.
        listed: list of the training images that have masks; None: all.
        max_parallel: trainings at a time.
        beside: data set of whose published figures are added, "voc"; None: of none.
        masks: folder of masks that supervised training reads; None: that of the configuration.

    Raises:
        UserError: a stage failed.
    """
    run, jobs = Run(config), []
    for mode in MODES:
        jobs += mode_jobs(mode, arguments, listed, masks if mode == "supervised" else None)
    state = json.dumps([asdict(config), read_json(run.debias / "manifest.json")["inputs"]])
    settings = hashlib.sha256(state.encode()).hexdigest()
    run_jobs(jobs, run.folder / "analysis" / "table6", settings, max_parallel)
    rows = []
    for mode, title in MODES.items():
        row = [title]
        for name in (f"{mode}_train", mode):
            scores = read_json(run.evaluation(name) / "scores.json")
            row += [percent(scores[key]) for key in METRICS]
        if beside == "voc":
            row += [paper()["table6"].get(mode, {}).get(key, NONE) for key in METRICS]
        rows.append(row)
    lists = listed or list_name(config.data, "train"), list_name(config.data, "val")
    lists += ("the paper, train",) if beside == "voc" else ()
    columns = ["training", *(f"{name}, {part}" for part in lists for name in ("mIoU", "FP", "FN"))]
    return Analysis("table6", 60, "Table 6: the parts of MARS", CAPTION, columns, rows)


def mode_jobs(
    mode: str, arguments: Sequence[str], listed: str | None, masks: str | None
) -> list[Job]:
    """Training in one mode, and its scores on both lists."""
    settings = [*arguments, f"--segmentation.mode={mode}"]
    settings += [f"--data.masks={masks}"] if masks else []
    train = Job(f"{mode}: train", ["train_segmentation.py", *settings])
    on_train = ["--split=train", f"--name={mode}_train"]
    on_train += [f"--data.train_list={listed}"] if listed else []
    return [
        train,
        Job(f"{mode}: score", ["evaluate.py", *settings], (train.name,)),
        Job(f"{mode}: score, training", ["evaluate.py", *settings, *on_train], (train.name,)),
    ]
