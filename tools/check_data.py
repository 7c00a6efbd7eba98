"""Reads everything that an experiment will read, once, and reports all problems together.

    python tools/check_data.py --config configs/voc.yaml

Looks at both lists: ids, images, tags, masks where there are any, and the folders of
wsss.labels_dir and uss.features_dir. Ends with status 1 if anything has to be mended; warnings are
about data from which less can be learnt.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core import notes
from core.config import Config, DataConfig, make_parser, parse
from core.errors import UserError, run_script
from core.features import read_features
from core.finder import FEATURES, LABELS, Files
from core.images import read_image
from core.labels import read_label, read_truth
from core.splits import Split, gather, masks_folder
from core.threads import in_threads


def main() -> None:
    config, _ = parse(make_parser("check_data.py", __doc__))
    problems, warnings = [], []
    for which in ("train", "val"):
        found, doubtful = check_list(config, which)
        problems += found
        warnings += doubtful
    for title, lines in (("to mend", problems), ("warning", warnings)):
        for line in dict.fromkeys(lines):
            print(f"{title}: {line}")
    classes = config.data.classes
    print(f"{len(classes)} classes: {', '.join(classes[:30])}{' ...' if len(classes) > 30 else ''}")
    count = len(dict.fromkeys(problems))
    told = len(dict.fromkeys(warnings)) + notes.warnings()
    print(f"{count} problems, {told} warnings")
    if problems:
        sys.exit(1)


def check_list(config: Config, which: str) -> tuple[list[str], list[str]]:
    """Problems and warnings of one list."""
    data = config.data
    if which == "val" and masks_folder(data) is None:
        return [], ["data.masks is not set: nothing can be scored"]
    try:
        split, problems = gather(data, which)
    except UserError as error:
        return [f"{which}: {error}"], []
    sizes, found = check_images(split, config.workers)
    problems += found
    folder = masks_folder(data)
    if folder is not None:  # only a part of the training images needs to have a mask
        needed = which == "val"
        problems += check_labels(folder, split, sizes, data, config.workers, read_truth, needed)
    if which == "val":
        return problems, []
    if config.wsss.labels_dir:
        labels = Path(config.wsss.labels_dir)
        problems += check_labels(labels, split, sizes, data, config.workers)
    if config.uss.features_dir:
        problems += check_features(Path(config.uss.features_dir), split, config.workers)
    return problems, doubtful_tags(split, data.classes)


def check_images(split: Split, workers: int) -> tuple[list[tuple[int, int] | None], list[str]]:
    """(H, W) of every image that can be decoded to its end, and the problems with the others."""
    paths = [(p,) for p in split.images]
    return _each(lambda path: read_image(path).shape[:2], paths, "images", workers)


def check_labels(
    folder: Path,
    split: Split,
    sizes: list,
    data: DataConfig,
    workers: int,
    read: Callable = read_label,
    all_of_them: bool = True,
) -> list[str]:
    """Problems with the label maps of a list: missing, broken, of another size, other values."""
    paths = map(Files(folder, LABELS).of_id, split.ids)
    items = [
        (path, len(data.classes), size)
        for path, size in zip(paths, sizes, strict=True)
        if all_of_them or path.exists()
    ]
    return _each(read, items, folder.name, workers)[1]


def check_features(folder: Path, split: Split, workers: int) -> list[str]:
    """Problems with feature files: missing, broken, not finite, of different widths."""
    items = [(path,) for path in map(Files(folder, FEATURES).of_id, split.ids)]
    shapes, problems = _each(lambda p: read_features(p).shape[0], items, "features", workers)
    widths = Counter(w for w in shapes if w)
    if len(widths) > 1:
        usual = widths.most_common(1)[0][0]
        odd = [p for (p,), w in zip(items, shapes, strict=True) if w not in (None, usual)]
        problems += [f"features {path} have another width than {usual}" for path in odd]
    return problems


def doubtful_tags(split: Split, classes: tuple[str, ...]) -> list[str]:
    """Classes whose bias cannot be seen: Eq. 1 compares with images that do not show the class."""
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


def _each(
    work: Callable, items: Iterable[tuple], title: str, workers: int
) -> tuple[list, list[str]]:
    """Results (None where it failed) and messages of `work` on every item, in parallel."""
    items = list(items)

    def attempt(item: tuple):
        try:
            return work(*item), None
        except UserError as error:
            return None, str(error)

    pairs = [*in_threads(attempt, items, workers, title, len(items), unit="file")]
    return [r for r, _ in pairs], [m for _, m in pairs if m]


if __name__ == "__main__":
    run_script(main)
