"""Shows without masks which classes have biased pseudo labels, and which context causes it.

    python tools/audit/audit_bias.py --config configs/demo.yaml [--with-masks]

Reads the training images and tags, the pseudo labels and the output of make_debiased_labels.py
(debias.output_dir, or <run_dir>/debias), with labels and features from any source. Writes into the
same folder, or to --output DIR:
    audit.html   one self-contained page: the ranking, and for each class a chart of its cut, and
                 the removed parts next to the backgrounds that they resemble in images without it
    audit.csv    the ranking
    audit.png    the ranking with one example of each class
docs/audit.md says how to read them. `--with-masks` adds how much of the removal was right.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.config import Config, make_parser, parse
from core.cut import MIN_GAIN
from core.data.labels import BACKGROUND, inspect_label, read_label
from core.data.lists import Split, ground_truth, label_files, read_split
from core.pipeline import Run, check_upstream
from core.run.errors import UserError, run_script
from core.run.files import atomic_write
from tools.audit.analyse_bias import removal
from tools.audit.clusters import Clusters, crop, read_debiased
from tools.audit.ranking import BLIND, Audit, context_share, rank
from tools.common.cuts import read_decisions
from tools.common.pages import encode, inline, templates

STRIP = 96  # pixels, height of an example in the PNG


def main() -> None:
    parser = make_parser("tools/audit/audit_bias.py", __doc__)
    parser.add_argument("--output", type=str | None, help="output folder")
    parser.add_argument("--examples", type=int, default=4, help="removed parts per class")
    parser.add_argument("--witnesses", type=int, default=3, help="backgrounds per part")
    parser.add_argument("--with-masks", action="store_true", help="also score the removal")
    parser.add_argument(
        "--stuff", type=str | None, help="folder of texture maps, to check the examples"
    )
    config, options = parse(parser)
    if options.examples < 0 or options.witnesses < 1:
        raise UserError("--examples must be at least 0 and --witnesses at least 1")
    run, split = Run(config), read_split(config.data, "train")
    masks = ground_truth(config.data, split) if options.with_masks or options.stuff else ()
    stuff = label_files(Path(options.stuff), split, "check --stuff") if options.stuff else ()
    check_upstream(config, split, "wsss", "uss", "debias")
    clusters = read_debiased(config, run, split)
    audits = rank(config, split, clusters, options.examples, options.witnesses)
    decisions = read_decisions(run.debias)
    for audit in audits:
        audit.cut = decisions.classes.get(audit.name, audit.cut)
    context = context_share(audits)
    scores = {"AUC of the score against data.biased_classes": area_under_curve(audits)}
    if options.with_masks:
        check_removal(config, run, split, masks, audits)
    if stuff:
        name = "share of the backgrounds shown with biased classes that have the part's texture"
        scores[name] = check_examples(clusters, audits, masks, stuff)
    output = Path(options.output or run.debias)
    write_csv(output / "audit.csv", audits)
    for example in (e for audit in audits for e in audit.examples):
        example.pictures = [crop(split, clusters, k) for k in (example.part, *example.witnesses)]
    with atomic_write(output / "audit.png") as tmp:
        tmp.write_bytes(chart(audits))
    path = output / "audit.html"
    with atomic_write(path) as tmp:
        template = templates(Path(__file__).parent).get_template("audit_bias.html.j2")
        values = {"audits": audits, "images": len(split), "scores": scores, "checked": bool(masks)}
        values |= {"context": context, "labels": run.wsss_labels}
        tmp.write_text(
            template.render(**values, inline=inline, blind=BLIND, min_gain=MIN_GAIN),
            "utf-8",
        )
    print(f"{'class':20}{'score':>7}{'removed':>9}{'odds':>7}{'gap':>6}")
    for audit in audits:
        figures = f"{audit.score:7.2f}{audit.removed:9.1%}{audit.odds:7.1f}{audit.gap:6.2f}"
        print(f"{audit.name:20}{figures}  {'(!)' if audit.warnings else ''}".rstrip())
    if context is not None:
        print(f"context in the labelled area: {context:.0%} (estimated without masks)")
    for name, value in scores.items():
        if value is not None:
            print(f"{name}: {value:.3f}")
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB), audit.csv and audit.png next to it")


def check_removal(
    config: Config, run: Run, split: Split, masks: Sequence[Path], audits: list[Audit]
) -> None:
    """Fills in precision and recall."""
    truth = [inspect_label(p, len(config.data.classes), biased=False)[0] for p in masks]
    classes = removal(config, run, run.debias / "labels", split, truth)["classes"]
    for audit in audits:
        audit.precision = classes[audit.name]["precision"]
        audit.recall = classes[audit.name]["context_removed"]


def area_under_curve(audits: list[Audit]) -> float | None:
    """Probability that a biased class outscores an unbiased one; None without both."""
    biased = np.array([a.score for a in audits if a.biased])
    others = np.array([a.score for a in audits if a.biased is False])
    if not len(biased) or not len(others):
        return None
    return float((np.sign(biased[:, None] - others) / 2 + 0.5).mean())


def check_examples(
    clusters: Clusters, audits: list[Audit], masks: Sequence[Path], stuff: Sequence[Path]
) -> float | None:
    """Share of witnesses with the same main texture as the removed part; None without any."""

    def kind(row: int) -> int | None:
        image = clusters.images[row]
        inside = clusters.pixels_of(row) & (read_label(masks[image]) == BACKGROUND)
        values = read_label(stuff[image])[inside]
        return int(np.bincount(values).argmax()) if len(values) else None

    examples = [e for a in audits if a.biased is not False for e in a.examples]
    same = [kind(e.part) == kind(w) for e in examples for w in e.witnesses]
    return float(np.mean(same)) if same else None


def write_csv(path: Path, audits: list[Audit]) -> None:
    """One line per class in the order of the ranking; unknown values are empty."""
    keys = ("name", "images", "score", "removed", "odds", "gap", "unseen", "warning")
    keys += ("precision", "recall", "biased")
    of_cut = ("object_share", "contrast")
    with atomic_write(path) as tmp, tmp.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("rank", *keys, *of_cut))
        for number, audit in enumerate(audits, 1):
            values = [getattr(audit, key) for key in keys]
            values[keys.index("warning")] = " ".join(audit.warnings)
            values += [getattr(audit.cut, key) for key in of_cut]
            writer.writerow((number, *(f"{v:.4f}" if isinstance(v, float) else v for v in values)))


def chart(audits: list[Audit]) -> bytes:
    """A PNG with a bar for each class, and its first removed part next to the witnesses."""
    row, left, bar = STRIP + 8, 150, 260
    shown = [[fit(p) for p in a.examples[0].pictures] if a.examples else [] for a in audits]
    pictures = max((sum(p.width + 8 for p in line) for line in shown), default=0)
    sheet = Image.new("RGB", (left + bar + 80 + pictures, row * len(audits) + 40), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    draw.text((10, 10), "bias score; a removed part | backgrounds without the class", "#333", font)
    best = max((a.score for a in audits), default=0) or 1
    for k, (audit, line) in enumerate(zip(audits, shown, strict=True)):
        top = 40 + k * row
        draw.text((10, top + 30), audit.name[:18], "black", font)
        length = round(bar * audit.score / best)
        draw.rectangle((left, top + 24, left + length, top + 54), "#b0148c")
        text = f"{audit.score:.2f}" + (" (!)" if audit.warnings else "")
        draw.text((left + length + 6, top + 30), text, "black", font)
        x = left + bar + 80
        for picture in line:
            sheet.paste(picture, (x, top + (STRIP - picture.height) // 2))
            x += picture.width + 8
    return encode(np.array(sheet), ".png")


def fit(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    image.thumbnail((STRIP, STRIP))
    return image


if __name__ == "__main__":
    run_script(main)
