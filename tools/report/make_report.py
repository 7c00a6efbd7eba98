"""Makes one self-contained page of pictures, tables and charts from the files of a run.

    python tools/report/make_report.py --config configs/demo.yaml [--summary]

Reads <run_dir> (manifests, scores, logs, labels, checkpoints) and the data set's images; writes
<run_dir>/report.html, which needs no network. For missing parts the page names the command that
makes them. `--summary` also prints the scores. Ground truth is only shown and compared with.

record.py and analyses.py read the run; figures.py, charts.py and pictures.py make numbers, curves
and pictures; page.html.j2 includes the sections, one file each, and report.css and report.js.
tools/common/ reads and draws stage 3's cuts.
"""

import base64
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.config import Config, make_parser, parse
from core.data.labels import palette
from core.data.lists import masks_folder, read_split
from core.pipeline import Run, own_stages
from core.run.errors import UserError, run_script
from core.run.files import atomic_write
from core.run.stage import stale_lines
from tools.common.cuts import read_decisions
from tools.common.pages import templates
from tools.common.titles import MODES
from tools.report.analyses import cell
from tools.report.charts import sweep_chart, training_curves
from tools.report.figures import (
    class_table,
    duration,
    headline,
    merged,
    percent,
    points,
    score_table,
)
from tools.report.pictures import IMAGES_PER_CLASS, training_gallery, validation_gallery
from tools.report.record import Commands, Record, read_record

STAGES = ("uss", "wsss", "debias")
PARTS = Path(__file__).parent


def main() -> None:
    parser = make_parser("tools/report/make_report.py", __doc__)
    parser.add_argument("--summary", action="store_true", help="Also print the scores.")
    config, options = parse(parser)
    arguments = [a for a in sys.argv[1:] if a != "--summary"]
    path = write_report(config, arguments)
    if options.summary:
        print_summary(config, Commands(config, arguments))
    print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB); open it in a browser")


def write_report(config: Config, arguments: Sequence[str]) -> Path:
    """Writes the page of the configured run.

    Args:
        config: configuration of the run.
        arguments: command line that gives `config`, for the commands that the page suggests.

    Returns:
        The path of the page.

    Raises:
        UserError: there is no run folder.
    """
    run = Run(config)
    if not run.folder.is_dir():
        raise UserError(f"{run.folder} is missing; run the stages first, or set run_dir")
    record, commands = read_record(run.folder), Commands(config, arguments)
    masks = bool(record.scores) or masks_folder(config.data) is not None
    trained = record.logs or any(name.startswith("segmentation/") for name in record.manifests)
    page = {
        "config": config,
        "biased": config.data.biased_classes,
        "titles": {name: title for name, (title, _) in MODES.items()},
        "per_class": IMAGES_PER_CLASS,
        "masks": masks,
        "trained": trained,
        "stale": stale_parts(config, record),
        "headline": headline(record.scores, config),
        "groups": score_table(record.scores, config, commands),
        "training": training_gallery(config, commands),
        "validation": validation_gallery(config, commands),
        "legend": {name: palette()[c] for c, name in enumerate(config.data.classes, 1)},
        "decisions": read_decisions(run.debias),
        "table": class_table(record.scores),
        "threshold": sweep_chart(record.sweep),
        "curves": training_curves(record.logs),
        "environment": merged({k: m["environment"] for k, m in record.manifests.items()}),
        "settings": merged({k: m["settings"] for k, m in record.manifests.items()}),
        "commands": commands,
        "style": (PARTS / "report.css").read_text("utf-8"),
        "script": (PARTS / "report.js").read_text("utf-8"),
        **vars(record),
    }
    jinja = templates(PARTS)
    jinja.filters |= {"percent": percent, "points": points, "duration": duration}
    jinja.filters |= {"cell": cell, "digest": digest}
    path = run.folder / "report.html"
    with atomic_write(path) as tmp:
        tmp.write_text(jinja.get_template("page.html.j2").render(page), "utf-8")
    return path


def stale_parts(config: Config, record: Record) -> dict[str, list[str]]:
    """Parts of the run whose inputs have changed since, each with the changes."""
    found = {f"evaluation/{name}": s.get("stale", []) for name, s in record.scores.items()}
    try:
        split = read_split(config.data, "train")
    except UserError:
        split = None  # the data set is not available
    for folder, identity, _ in own_stages(config, split, *STAGES) if split else ():
        found[folder.name] = stale_lines(folder, identity, config.workers)
    return {name: lines for name, lines in found.items() if lines}


def print_summary(config: Config, commands: Commands) -> None:
    """Prints the table of scores, in per cent."""
    scores = read_record(Path(config.run_dir)).scores
    print(f"{'':30}{'mIoU':>7}{'FP':>7}{'FN':>7}{'biased':>8}{'others':>8}  images")
    for group in score_table(scores, config, commands):
        for row in group["rows"]:
            miou, fp, fn, biased, others = map(percent, row["values"].values())
            line = f"{row['title']:30}{miou:>7}{fp:>7}{fn:>7}{biased:>8}{others:>8}"
            print(f"{line}  {row['images']['scored']}/{row['images']['of']} {group['list'] or ''}")


def digest(script: str) -> str:
    """The hash with which the page's security policy allows this script and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


if __name__ == "__main__":
    run_script(main)
