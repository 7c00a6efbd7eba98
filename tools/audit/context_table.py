"""What the labels of each class show: the share of their area by true class, context included.

    python tools/audit/context_table.py --config FILE --contexts MASKS --names NAMES.txt \
        --labels before=LABELS after=DEBIASED [trained=PREDICTIONS]

For data sets whose masks also label the context (grass, water, road). MASKS contains <id>.png, in
which k is the k-th line of NAMES.txt, counted from 1, and other values are void. Reads the training
images for which every folder has a file. Void pixels and pixels marked as biased do not count.
Prints a Markdown table with, for each class and folder, the share of the labelled area that shows
the class itself, and the shares of the contexts that are largest in the first folder; --output also
writes it as a CSV file.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.config import make_parser, parse
from core.data.labels import read_label
from core.data.lists import read_split
from core.run.errors import UserError, run_script
from core.run.files import atomic_write, user_path

SHOWN = 3  # contexts per class


def main() -> None:
    parser = make_parser("tools/audit/context_table.py", __doc__)
    parser.add_argument("--contexts", type=str, required=True, help="masks of objects and context")
    parser.add_argument("--names", type=str, required=True, help="their class names, one per line")
    parser.add_argument("--labels", nargs="+", required=True, metavar="TITLE=FOLDER")
    parser.add_argument("--output", type=str | None, help="a CSV file")
    config, options = parse(parser)
    names = user_path(options.names).read_text("utf-8").split()
    unknown = sorted({*config.data.classes} - {*names})
    if unknown:
        raise UserError(f"{options.names} lacks the classes {', '.join(unknown)}")
    folders = {}
    for entry in options.labels:
        title, _, folder = entry.partition("=")
        if not folder or not Path(folder).is_dir():
            raise UserError(f"--labels {entry}: expected TITLE=FOLDER, with a folder that exists")
        folders[title] = Path(folder)
    ids, contexts = read_split(config.data, "train").ids, Path(options.contexts)
    ids = [i for i in ids if all((f / f"{i}.png").is_file() for f in (*folders.values(), contexts))]
    if not ids:
        raise UserError("no training image has a file in all folders; check --labels, --contexts")
    shares = {
        title: count(ids, folder, contexts, len(config.data.classes), len(names))
        for title, folder in folders.items()
    }
    rows = list(table(config.data.classes, names, shares))
    columns = ["class", *(f"{title}: {part}" for title in shares for part in ("itself", "context"))]
    if options.output:
        with atomic_write(Path(options.output)) as tmp, tmp.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    for row in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(row)} |")
    print(f"\n{len(ids)} images")


def count(ids: Sequence[str], labels: Path, contexts: Path, classes: int, names: int) -> np.ndarray:
    """(C, N) pixels of each labelled class by true class."""
    found = np.zeros((classes, names), np.int64)
    for image_id in ids:
        truth = read_label(contexts / f"{image_id}.png")
        label = read_label(labels / f"{image_id}.png", classes, truth.shape)
        valid = (label > 0) & (label <= classes) & (truth > 0) & (truth <= names)
        pairs = (label[valid].astype(np.int64) - 1) * names + truth[valid] - 1
        found += np.bincount(pairs, minlength=classes * names).reshape(found.shape)
    return found


def table(classes: Sequence[str], names: Sequence[str], counts: dict[str, np.ndarray]):
    """Rows of text: for each class and folder, the share of the class itself and the contexts that
    are largest in the first folder."""
    first = next(iter(counts.values()))
    for c, name in enumerate(classes):
        own = names.index(name)
        order = [k for k in first[c].argsort()[::-1] if k != own and first[c, k]][:SHOWN]
        row = [name]
        for found in counts.values():
            shares = 100 * found[c] / max(1, found[c].sum())
            row += [f"{shares[own]:.0f} %", ", ".join(f"{names[k]} {shares[k]:.0f}" for k in order)]
        yield row


if __name__ == "__main__":
    run_script(main)
