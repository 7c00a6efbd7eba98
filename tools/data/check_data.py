"""Reads everything that an experiment will read and reports all problems together.

    python tools/data/check_data.py --config configs/voc.yaml

Checks both lists: ids, images, tags, existing masks, and the files in wsss.labels_dir and
uss.features_dir, each by itself and against images and tags. Ends with status 1 if anything has to
be corrected. Warnings are about unusual files, and about data that is hard to learn from.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.config import Config, make_parser, parse
from core.data.checks import Findings, Kind, Photograph, check_features, check_labels, headers
from core.data.features import read_features
from core.data.finder import FEATURES, LABELS, Files
from core.data.images import read_image
from core.data.lists import Split, gather, masks_folder
from core.run import log
from core.run.errors import UserError, run_script
from core.run.threads import in_threads


def main() -> None:
    config, _ = parse(make_parser("check_data.py", __doc__))
    problems, warnings = [], []
    for which in ("train", "val"):
        found, doubtful = check_list(config, which)
        problems += found
        warnings += doubtful
    for title, lines in (("problem", problems), ("warning", warnings)):
        for line in dict.fromkeys(lines):
            print(f"{title}: {line}")
    classes = config.data.classes
    print(f"{len(classes)} classes: {', '.join(classes[:30])}{' ...' if len(classes) > 30 else ''}")
    printed = [line for line in log.printed.values() if line.startswith("warning: ")]
    print(f"{len({*problems})} problems, {len({*warnings}) + len(printed)} warnings")
    if problems:
        sys.exit(1)


def check_list(config: Config, which: str) -> tuple[list[str], list[str]]:
    """Problems and warnings about one list, "train" or "val"."""
    data = config.data
    if which == "val" and masks_folder(data) is None:
        return [], ["data.masks is not set: nothing can be scored"]
    try:
        split, problems = gather(data, which)
    except UserError as error:
        return [f"{which}: {error}"], []
    found = Findings(problems + check_images(split, config.workers))
    photographs, folder = headers(split, config.workers), masks_folder(data)
    if folder is not None:  # training images may lack a mask
        found += labels_of(split, photographs, folder, config, "truth", which == "val")
    if which == "val":
        return found.problems, found.warnings
    if config.wsss.labels_dir:
        found += labels_of(split, photographs, Path(config.wsss.labels_dir), config, "pseudo")
    if config.uss.features_dir:
        files = [*map(Files(Path(config.uss.features_dir), FEATURES).of_id, split.ids)]
        found += check_features(
            files, photographs, config.workers, lambda p: tuple(read_features(p).shape)
        )
    return found.problems, found.warnings + doubtful_tags(split, data.classes)


def check_images(split: Split, workers: int) -> list[str]:
    """A problem for each image that cannot be fully decoded."""

    def problem(path: Path) -> str | None:
        try:
            read_image(path)
        except UserError as error:
            return str(error)

    found = in_threads(problem, split.images, workers, "images", len(split))
    return [text for text in found if text]


def labels_of(
    split: Split,
    photographs: Sequence[Photograph],
    folder: Path,
    config: Config,
    kind: Kind,
    all_of_them: bool = True,
) -> Findings:
    """Findings about a folder of label maps; unless `all_of_them`, maps may be missing."""
    paths = [*map(Files(folder, LABELS).of_id, split.ids)]
    some = [k for k, path in enumerate(paths) if all_of_them or path.exists()]
    return check_labels(
        [paths[k] for k in some],
        [photographs[k] for k in some],
        split.tags[some],
        config.data.classes,
        config.workers,
        kind,
    )


def doubtful_tags(split: Split, classes: tuple[str, ...]) -> list[str]:
    """Warnings about classes whose bias cannot be seen: Eq. 1 needs images without the class."""
    warnings, tags = [], split.tags
    for k, name in enumerate(classes):
        shown = tags[:, k]
        if not shown.any():
            warnings.append(f"no training image shows {name}; it cannot be learnt")
            continue
        if shown.mean() > 0.9:
            warnings.append(
                f"{shown.mean():.0%} of the training images show {name}; its context hardly occurs "
                "without it, so debiasing cannot see it. Add images without it"
            )
        together = [c for j, c in enumerate(classes) if j != k and tags[shown, j].all()]
        if together and shown.sum() > 1:
            warnings.append(f"{name} never occurs without {together[0]}; both will be confused")
    untagged = int((~tags.any(1)).sum())
    if untagged:
        warnings.append(f"{untagged} training images have no tag: background only")
    return warnings


if __name__ == "__main__":
    run_script(main)
