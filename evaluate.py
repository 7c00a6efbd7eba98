"""Stage 5: score a trained segmenter, or any folder of label maps.

    python evaluate.py --config configs/demo.yaml          # the checkpoint of segmentation.mode
    python evaluate.py --config configs/demo.yaml --predictions runs/demo/wsss/labels --split train
    python evaluate.py --predictions DIR --masks DIR --num_classes 20 --output scores.json
    python evaluate.py --config configs/voc.yaml --data.val_list test --submission comp6_test_cls

Prints a table and writes JSON: mIoU (background included), FP and FN (shares of the union, mean
over the foreground classes, as in the paper's Table 6), and every class. A missing prediction is an
error unless --allow-missing is given, and then the score says how many images it stands on. In
predictions, biased (254) and ignored (255) pixels count as background.
"""

import hashlib
import sys
from pathlib import Path
from typing import Literal

from core import distributed
from core.config import Config, make_parser, parse
from core.errors import UserError, run_script
from core.files import write_json
from core.runs import Run, Stage
from core.scoring import score_files
from core.segmenter import predict, trained_weights
from core.splits import Split, ground_truth, list_name, masks_folder, read_split
from core.submission import COMPETITIONS, check_submission, write_submission


def main() -> None:
    parser = make_parser("evaluate.py", __doc__)
    parser.add_argument("--predictions", type=str | None, help="Score this folder of <id>.png.")
    parser.add_argument("--masks", type=str | None, help="Ground truth; without a --config.")
    parser.add_argument("--num_classes", type=int | None, help="Without background and --config.")
    parser.add_argument(
        "--split",
        type=Literal["train", "val"],
        default="val",
        help="train or val, with a --config.",
    )
    parser.add_argument(
        "--submission",
        type=Literal[COMPETITIONS],
        help="Write an archive for VOC's server, unscored.",
    )
    parser.add_argument("--name", type=str | None, help="Folder below <run_dir>/evaluation.")
    parser.add_argument(
        "--output", type=str | None, help="Write the scores to this JSON file, too."
    )
    parser.add_argument("--allow-missing", action="store_true", help="Score what is there.")
    config, options = parse(parser)
    if options.submission:
        submit(config, options)
        return
    if options.masks:
        result = score_folders(config, options)
        if options.output:
            save(Path(options.output), result)
    elif options.predictions:
        result = score_labels(config, options)
    elif masks_folder(config.data) is None:
        segment(config, options)
        return
    else:
        result = score_checkpoint(config, options)
    print_table(result)


def score_folders(config: Config, options) -> dict:
    """Scores two folders of label maps without a configuration."""
    if not options.predictions or options.num_classes is None:
        raise UserError("--masks goes together with --predictions and --num_classes")
    masks = sorted(Path(options.masks).rglob("*.png"))
    if not masks:
        raise UserError(f"{options.masks} holds no PNG masks")
    predictions = [Path(options.predictions) / mask.relative_to(options.masks) for mask in masks]
    names = [str(c) for c in range(1, options.num_classes + 1)]
    return score_files(predictions, masks, names, options.allow_missing, config.workers)


def score_labels(config: Config, options) -> dict:
    """Scores a folder of label maps against the masks of one list of the data set."""
    split = read_split(config.data, options.split, tagged=False)
    predictions = [Path(options.predictions) / f"{i}.png" for i in split.ids]
    masks = ground_truth(config.data, split)
    result = score_files(
        predictions, masks, config.data.classes, options.allow_missing, config.workers
    )
    result["images"]["skipped"] = split.skipped
    folder = Path(options.predictions).resolve()
    name = options.name or f"{folder.parent.name}_{folder.name}"
    save(Path(options.output or Run(config).evaluation(name) / "scores.json"), result)
    return result


def score_checkpoint(config: Config, options) -> dict:
    """Predicts one list with the EMA of the configured training, then scores the predictions."""
    split = read_split(config.data, options.split, tagged=False)
    masks = ground_truth(config.data, split)
    stage, predictions = predict_list(config, split, options.name)
    result = score_files(
        predictions, masks, config.data.classes, options.allow_missing, config.workers
    )
    result["images"]["skipped"] = split.skipped
    save(stage.folder / "scores.json", result)
    if options.output:
        save(Path(options.output), result)
    if not stage.finished:
        stage.finish({k: result[k] for k in ("miou", "fp", "fn")})
    return result


def predict_list(config: Config, split: Split, name: str | None) -> tuple[Stage, list[Path]]:
    """Label maps of a list, in <run_dir>/evaluation/<name>/predictions."""
    run = Run(config)
    weights = trained_weights(run)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    name = name or run.segmentation().name
    identity, inputs = ("data", "segmentation", "evaluation"), {}
    inputs |= {"ids": split.ids, "weights": [digest]}
    stage = Stage(
        run.evaluation(name),
        f"stage 5, evaluation ({name})",
        config,
        identity,
        inputs,
        split.skipped,
    )
    folder = stage.folder / "predictions"
    if not stage.already_done():
        predict(config, weights, split, folder)
    return stage, [folder / f"{i}.png" for i in split.ids]


def segment(config: Config, options) -> None:
    """Predicts the training images of a data set that has no masks."""
    split = read_split(config.data, "train", tagged=False)
    stage, predictions = predict_list(config, split, options.name)
    if not stage.finished:
        stage.finish({})
    print(
        f"{len(predictions)} predictions of the training images in {predictions[0].parent}; not "
        "scored, because data.masks is not set"
    )


def submit(config: Config, options) -> None:
    """Predicts a list without masks and packs the predictions for VOC's evaluation server."""
    competition = options.submission
    wanted, name = competition.split("_")[1], list_name(config.data, options.split)
    if name != wanted:
        raise UserError(
            f"{competition} is for the list {wanted}, not {name}; give --data.val_list {wanted}"
        )
    split = read_split(config.data, options.split, tagged=False)
    stage, predictions = predict_list(config, split, options.name or competition)
    archive = stage.folder / f"{competition}.tar.gz"
    if distributed.rank() == 0:
        write_submission(archive, competition, predictions)
        check_submission(archive, competition, split.ids, num_classes=len(config.data.classes))
    distributed.meet()
    if not stage.finished:
        stage.finish({})
    print(f"{len(predictions)} predictions in {archive}")


def save(path: Path, result: dict) -> None:
    """Writes scores; of several processes the first one does."""
    if distributed.rank() == 0:
        write_json(path, result)


def print_table(result: dict) -> None:
    """The scores for a person, in per cent."""
    rows = zip(result["classes"], *result["per_class"].values(), strict=True)
    print(f"{'':14}{'IoU':>7}{'FP':>7}{'FN':>7}")
    for name, *values in rows:
        print(f"{name:14}" + "".join("      -" if v is None else f"{v:7.1%}" for v in values))
    images = result["images"]
    means = "   ".join(
        f"{title} {'-' if result[key] is None else format(100 * result[key], '.1f') + ' %'}"
        for key, title in (("miou", "mIoU"), ("fp", "FP"), ("fn", "FN"))
    )
    for note in result["notes"]:
        print(f"note: {note}")
    skipped = f", {len(images['skipped'])} skipped" if images.get("skipped") else ""
    print(f"{means}   ({images['scored']}/{images['of']} images{skipped})")
    if skipped or images["scored"] < images["of"]:
        print("a part of the images only: do not compare this score", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
