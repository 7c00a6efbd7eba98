"""The audit and the report of label maps from any source, in one command.

    python tools/audit/audit_labels.py --images PHOTOGRAPHS --labels LABELS --output AUDIT

LABELS are <id>.png of the photographs' sizes: 0 background, classes 1, 2, ..., whose names are in
made_from.json there (tools/import_labels.py writes both) or in --classes. No masks and no GPU are
needed. The tags are the classes in the label maps. Features come from the network of
configs/laptop.yaml (docs/own_data.md says how to install its weights), from another network of
timm (--backbone), or from files (--features).
Writes below --output:
    audit.html        which classes contain context, and which: the page to send to a colleague
    audit.csv, .png   the ranking
    report.html       photographs with their labels before and after debiasing, and the settings
    run/              the tags, features and debiased labels that it was made from
An interrupted call continues. Further options go to all stages, such as --debias.alpha 0.3.
"""

import csv
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.data.finder import LABELS, PHOTOGRAPHS, Files
from core.data.labels import BIASED_ON_DISK, read_label
from core.data.tags import SEPARATORS
from core.run.errors import UserError, run_script
from core.run.files import user_path
from core.run.stage import SIGNATURE
from core.run.threads import in_threads
from tools.common import ROOT, check_outside, tool_parser
from tools.common.jobs import call
from tools.common.tables import write_table
from tools.exchange.names import names_of


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--images", type=user_path, required=True, help="folder of photographs")
    parser.add_argument("--labels", type=user_path, required=True, help="folder of label maps")
    parser.add_argument("--output", type=user_path, required=True, help="folder of the result")
    parser.add_argument("--classes", help="names of labels 1, 2, ...; default: made_from.json's")
    parser.add_argument("--config", type=user_path, default=ROOT / "configs/laptop.yaml")
    parser.add_argument("--backbone", help="name of a timm network that gives the features")
    parser.add_argument("--features", type=user_path, help="folder of (D, h, w) feature files")
    options, further = parser.parse_known_args()
    check_outside(options.output, options.labels, options.images)
    names = names_of(options.labels, options.classes)
    output, run = options.output.resolve(), options.output.resolve() / "run"
    tags = write_tags(options.images, options.labels, names, run / "tags.csv")
    print(f"{len(tags)} photographs with labels of {len(names)} classes")
    settings = [
        f"--config={options.config.resolve()}",
        "--data.format=folder",
        f"--data.root={options.images.resolve()}",
        f"--data.tags={run / 'tags.csv'}",
        f"--data.classes={json.dumps(names, ensure_ascii=False)}",
        f"--wsss.labels_dir={options.labels.resolve()}",
        f"--run_dir={run}",
    ]
    if options.backbone:
        backbone = {"name": options.backbone, "weights": "timm"}
        settings.append(f"--uss.backbone={json.dumps(backbone)}")
    if options.features:
        settings.append(f"--uss.features_dir={options.features.resolve()}")
    settings += further
    if not options.features:
        step("features", "train_uss.py", *settings)
    step("debiasing", "make_debiased_labels.py", *settings)
    step("audit", "tools/audit/audit_bias.py", *settings, f"--output={output}")
    step("report", "tools/report/make_report.py", *settings)
    shutil.copyfile(run / "report.html", output / "report.html")
    print(summary(output / "audit.csv"))
    print(f"open {output / 'audit.html'} (docs/audit.md says how to read it) and report.html there")


def step(title: str, script: str, *arguments: str) -> None:
    """Runs one of the repository's scripts under a title.

    Raises:
        UserError: it failed, and has said why.
    """
    print(f"{title} ...", flush=True)
    try:
        call(script, *arguments, quiet=True)
    except UserError as error:
        change = "after a change of labels or photographs, choose another --output"
        raise UserError(f"{error}; {change}") from None


def write_tags(
    images: Path, labels: Path, names: Sequence[str], path: Path
) -> dict[str, list[str]]:
    """Writes the classes in each label map as a table of tags.

    Raises:
        UserError: there are no label maps, one has no photograph, or all are empty; a name cannot
            be in a table; or the table of an earlier call, on which stages have worked, differs.
    """
    odd = next((name for name in names if SEPARATORS.search(name) or name[0] in "[{"), None)
    if odd is not None:
        raise UserError(
            f"the class {odd!r} cannot be in a table of tags, where , ; and | separate classes and "
            f"brackets make lists; rename it in {labels / SIGNATURE}, or else in --classes"
        )
    maps = Files(labels, LABELS)
    if not maps.ids:
        raise UserError(f"{labels} contains no label maps")
    photographs = Files(images, PHOTOGRAPHS)
    remedy = "correct --images: each label map needs its photograph"
    found = photographs.every(maps.ids, remedy)

    def classes(name: str) -> list[str]:
        values = np.unique(read_label(maps.of_id(name), len(names)))
        return [names[k - 1] for k in values if 0 < k < BIASED_ON_DISK]

    rows = in_threads(classes, maps.ids, 4, "label maps", len(maps.ids))
    table = {
        photograph.relative_to(images).as_posix(): row
        for photograph, row in zip(found, rows, strict=True)
    }
    if not any(table.values()):
        raise UserError(f"no label map of {labels} contains a class")
    written = {name: ";".join(row) for name, row in table.items()}
    if path.is_file() and read_rows(path) == written:
        return table
    if path.is_file() and any(other != path for other in path.parent.iterdir()):
        # The audit that is there keeps the tags that it was made from.
        raise UserError(
            f"the labels are not those of the earlier call, whose classes are in {path}; after a "
            "change of labels or photographs, choose another --output"
        )
    write_table(path, table)
    return table


def read_rows(path: Path) -> dict[str, str]:
    """The cells of a table of tags as they were written, by image."""
    with path.open(encoding="utf-8", newline="") as file:
        return {row.get("image", ""): row.get("tags", "") for row in csv.DictReader(file)}


def summary(path: Path) -> str:
    """The ranking as lines of text."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    lines = [f"{'class':20}  images  score  removed  object share"]
    for row in rows:
        shares = [f"{float(row[k]):.0%}" if row[k] else "-" for k in ("removed", "object_share")]
        figures = f"{row['images']:>6}  {float(row['score']):5.2f}  {shares[0]:>7}  {shares[1]:>12}"
        lines.append(f"{row['name']:20}  {figures}{'  (!)' if row['warning'] else ''}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
