"""Stage 5: score a trained segmenter, or any folder of label maps.

    python evaluate.py --config configs/demo.yaml          # the checkpoint of segmentation.mode
    python evaluate.py --config configs/demo.yaml --predictions runs/demo/wsss/labels --split train
    python evaluate.py --predictions DIR --masks DIR --num_classes 20 --output scores.json
    python evaluate.py --config configs/voc.yaml --data.val_list test --submission comp6_test_cls

Prints a table and writes JSON: mIoU (background included), FP and FN (shares of the union, averaged
over the foreground classes, as in the paper's Table 6), and the scores of every class. A missing
prediction is an error unless --allow-missing is given; the result then states how many images were
scored. In predictions, biased (254) and ignored (255) pixels count as background.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from core import pipeline
from core.config import Config, make_parser, parse
from core.data.finder import LABELS
from core.data.labels import BIASED_ON_DISK
from core.data.lists import Split, ground_truth, list_name, masks_folder, read_split
from core.metrics import pair_folders, score_files
from core.pipeline import Run
from core.run import distributed
from core.run.errors import UserError, run_script
from core.run.files import read_json, write_json
from core.run.inputs import stamp, summary
from core.run.stage import SIGNATURE, Stage, check_classes, stale_lines
from core.segmenter import predict


def main() -> None:
    parser = make_parser("evaluate.py", __doc__, "segmentation", "evaluation")
    text = str | None
    parser.add_argument("--predictions", type=text, help="Score this folder of <id>.png.")
    parser.add_argument("--masks", type=text, help="Ground truth; without a --config.")
    parser.add_argument(
        "--num_classes", type=int | None, help="Number of foreground classes, with --masks."
    )
    parser.add_argument(
        "--split", type=Literal["train", "val"], default="val", help="train or val; with --config."
    )
    parser.add_argument(
        "--submission", type=text, help="Write an archive for VOC's server: comp6_test_cls."
    )
    parser.add_argument("--name", type=text, help="Folder below <run_dir>/evaluation.")
    parser.add_argument("--output", type=text, help="Also write the scores to this JSON file.")
    parser.add_argument(
        "--allow-missing", action="store_true", help="Score the predictions that exist."
    )
    config, options = parse(parser)
    if options.name and len(Path(options.name).parts) != 1 or options.name == "..":
        raise UserError(f"--name {options.name} must be the name of one folder, without slashes")
    if options.submission:
        if options.predictions or options.masks:
            raise UserError(
                "--submission packs the network's own predictions; leave out the others"
            )
        from tools.submit_voc import submit  # which calls predict_list

        submit(config, options.submission, options.name, options.split)
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
    if not 0 < options.num_classes < BIASED_ON_DISK:
        raise UserError(f"--num_classes must be 1 to {BIASED_ON_DISK - 1}: {options.num_classes}")
    if options.name:
        raise UserError("--name is a folder below run_dir; with --masks, give --output scores.json")
    folders = Path(options.predictions), Path(options.masks)
    refuse_itself(*folders)
    signed = [f / SIGNATURE for f in folders]
    if all(path.is_file() for path in signed):
        check_classes(folders[0], read_json(signed[1])["classes"])
    pairs = pair_folders(*folders)
    names = [str(c) for c in range(1, options.num_classes + 1)]
    return score_files(*pairs, names, options.allow_missing, config.workers)


def score_labels(config: Config, options) -> dict:
    """Scores a folder of label maps against the masks of one list of the data set."""
    folder, truth = Path(options.predictions), masks_folder(config.data)
    if truth is not None:
        refuse_itself(folder, truth)
    check_classes(folder, config.data.classes)
    split = read_split(config.data, options.split, tagged=False)
    predictions = pipeline.paths_of(folder, LABELS, split)
    result = score_list(config, options, split, predictions)
    name = options.name or f"{folder.resolve().parent.name}_{folder.resolve().name}"
    path = Path(options.output or Run(config).evaluation(name) / "scores.json")
    if not options.output:
        refuse_others_scores(path, result)
    save(path, result)
    return result


def refuse_itself(predictions: Path, masks: Path) -> None:
    """Raises a `UserError` if masks would be compared with themselves, which scores 100 %."""
    if predictions.resolve() == masks.resolve():
        raise UserError(f"{predictions} holds the masks; correct --predictions")


def score_checkpoint(config: Config, options) -> dict:
    """Predicts one list with the EMA of the configured training, then scores the predictions."""
    split = read_split(config.data, options.split, tagged=False)
    ground_truth(config.data, split)  # missing masks are reported before hours of prediction
    name = Run(config).segmentation().name
    name = options.name or (name if options.split == "val" else f"{name}_train")
    stage, predictions = predict_list(config, split, name)
    result = score_list(config, options, split, predictions)
    result["made_from"] = stage.made_from
    result["stale"] = warn_if_stale(config)
    save(stage.folder / "scores.json", result)
    if options.output:
        save(Path(options.output), result)
    if not stage.finished:
        stage.finish({k: result[k] for k in ("miou", "fp", "fn")})
    return result


def score_list(config: Config, options, split: Split, predictions: Sequence[Path]) -> dict:
    """Scores with the name and the digests of what they were computed on."""
    masks, names = ground_truth(config.data, split), config.data.classes
    result = score_files(predictions, masks, names, options.allow_missing, config.workers)
    result["images"]["skipped"] = split.skipped
    inputs = {"masks": masks, "predictions": predictions}
    items = {key: dict(zip(split.ids, paths, strict=True)) for key, paths in inputs.items()}
    digests = summary(stamp(items, (), config.workers))
    result["data"] = {
        "root": str(Path(config.data.root).resolve()),
        "split": options.split,
        "list": list_name(config.data, options.split),
        "masks": digests["masks"],
        "biased_classes": config.data.biased_classes,
    }
    folder = str(Path(*predictions[0].parts[: -len(Path(split.ids[0]).parts)]).resolve())
    result["predictions"] = {"folder": folder, **digests["predictions"]}
    return result


def refuse_others_scores(path: Path, result: dict) -> None:
    """Raises a `UserError` if `path` holds scores of a trained network, of other predictions, or
    of another list."""
    reason = None
    if path.with_name("manifest.json").exists():
        reason = "is the evaluation of a trained network"
    elif path.is_file():
        earlier = read_json(path)
        there, here = (s.get("predictions", {}) for s in (earlier, result))
        lists = [s.get("data", {}).get("list") for s in (earlier, result)]
        if there.get("folder") != here["folder"] and there.get("sha256") != here["sha256"]:
            reason = f"holds the scores of {there.get('folder', 'other label maps')}"
        elif lists[0] != lists[1]:
            reason = f"holds scores on the list {lists[0]}, these are on {lists[1]}"
    if reason:
        raise UserError(f"{path.parent} {reason}; give these scores a --name of their own")


def predict_list(config: Config, split: Split, name: str) -> tuple[Stage, list[Path]]:
    """Label maps of a list, in <run_dir>/evaluation/<name>/predictions."""
    run = Run(config)
    weights = pipeline.trained_weights(run)
    network, classes = pipeline.load_segmenter(weights, config, configured=True)
    identity = pipeline.prediction_identity(config, split, weights, classes)
    title, remedy = f"stage 5, evaluation ({name})", "give this evaluation a --name of its own"
    folder = run.evaluation(name)
    stage = Stage(folder, title, config, identity, config.data.root, split.skipped, remedy)
    folder = stage.folder / "predictions"
    if not stage.already_done():
        stage.sign(folder)
        predict(network, split, folder, config.evaluation, config)
    return stage, [folder / f"{i}.png" for i in split.ids]


def warn_if_stale(config: Config) -> list[str]:
    """Warns if available training data differ from what the network was trained on; the scores
    describe the network all the same."""
    run = Run(config)
    try:
        split = read_split(config.data, "train")
    except UserError:
        return []  # the network may have been trained elsewhere
    labels = pipeline.paths_of(run.labels_to_train_on, LABELS, split)
    identity = pipeline.segmentation_identity(config, split, labels)
    lines = stale_lines(run.segmentation(), identity, config.workers, common=True)
    if lines:
        shown = "\n".join(f"  {line}" for line in lines)
        print(
            f"warning: the network in {run.segmentation()} is stale; what it was trained on has "
            f"changed since:\n{shown}\nTo train it again, choose another run_dir, or remove the "
            "folder yourself and run train_segmentation.py",
            file=sys.stderr,
        )
    return lines


def segment(config: Config, options) -> None:
    """Predicts the training images of a data set that has no masks."""
    split = read_split(config.data, "train", tagged=False)
    name = options.name or Run(config).segmentation().name
    stage, predictions = predict_list(config, split, name)
    if not stage.finished:
        stage.finish({})
    print(
        f"{len(predictions)} predictions of the training images in "
        f"{stage.folder / 'predictions'}; not scored, because data.masks is not set"
    )


def save(path: Path, result: dict) -> None:
    """Writes scores; with several processes, only the first one does."""
    if distributed.rank() == 0:
        write_json(path, result)


def print_table(result: dict) -> None:
    """The scores for a person, in per cent."""
    print(f"{'':14}{'IoU':>7}{'FP':>7}{'FN':>7}")
    for name, *values in zip(result["classes"], *result["per_class"].values(), strict=True):
        print(f"{name:14}" + "".join("      -" if v is None else f"{v:7.1%}" for v in values))
    for note in result["notes"]:
        print(f"note: {note}")
    for key, title in {"miou": "mIoU", "fp": "FP", "fn": "FN"}.items():
        mean = "-" if result[key] is None else f"{100 * result[key]:.1f} %"
        print(f"{title} {mean}", end="   ")
    images = result["images"]
    skipped = f", {len(images['skipped'])} skipped" if images.get("skipped") else ""
    print(f"({images['scored']}/{images['of']} images{skipped})")
    if skipped or images["scored"] < images["of"]:
        print("only part of the images was scored: do not compare this score", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
