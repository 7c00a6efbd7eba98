"""Table 6: the effect of filling biased pixels and of weighting them by certainty."""

from collections.abc import Sequence

from core.config import Config
from core.data.lists import list_name
from core.pipeline import Run
from core.run.files import read_json
from tools.common.jobs import Job, digest_of_run, run_jobs
from tools.common.titles import MODES
from tools.paper.results import NONE, Analysis, paper, percent

TRAINED = ("wsss", "ignore", "complement", "mars", "supervised")
METRICS = ("miou", "fp", "fn")
CAPTION = (
    "Identically trained segmenters, all but the last on the same pseudo labels, scored on "
    "training images, as in the paper, and on the validation list; per cent. FP and FN are shares "
    "of the union, averaged over the classes. The row that ignores biased pixels is not in the "
    "paper."
)


def table6(
    config: Config,
    arguments: Sequence[str],
    listed: str | None,
    max_parallel: int,
    data_set: str | None,
    masks: str | None = None,
) -> Analysis:
    """Trains and scores the modes that are missing.

    Args:
        config: configuration of a run whose stage 3 is finished.
        arguments: command line that gives `config`.
        listed: list of the training images that have masks; None: all.
        max_parallel: number of trainings at a time.
        data_set: data set whose published figures are added, "voc"; None: no published figures.
        masks: folder of masks for supervised training; None: the configured one.

    Raises:
        UserError: a stage failed.
    """
    run, jobs = Run(config), []
    for mode in TRAINED:
        jobs += mode_jobs(mode, arguments, listed, masks if mode == "supervised" else None)
    settings = digest_of_run(config, run.debias)
    run_jobs(jobs, run.folder / "analysis" / "table6", settings, max_parallel)
    rows = []
    for mode in TRAINED:
        row = [": ".join(MODES[mode])]
        for name in (f"{mode}_train", mode):
            scores = read_json(run.evaluation(name) / "scores.json")
            row += [percent(scores[key]) for key in METRICS]
        if data_set == "voc":
            row += [paper()["table6"].get(mode, {}).get(key, NONE) for key in METRICS]
        rows.append(row)
    lists = listed or list_name(config.data, "train"), list_name(config.data, "val")
    lists += ("the paper, train",) if data_set == "voc" else ()
    columns = ["training", *(f"{name}, {part}" for part in lists for name in ("mIoU", "FP", "FN"))]
    return Analysis("table6", 60, "Table 6: the parts of MARS", CAPTION, columns, rows)


def mode_jobs(
    mode: str, arguments: Sequence[str], listed: str | None, masks: str | None
) -> list[Job]:
    """The training in one mode and its scores on both lists."""
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
