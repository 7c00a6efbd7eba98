"""What every analysis writes: JSON for the report, PNG and PDF, Markdown on the screen."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from core.run.files import atomic_write, read_json, write_json

PAPER = Path(__file__).with_name("paper.json")
NONE = "–"  # a figure that there is none of
BLUE, ORANGE = "#0072b2", "#d55e00"  # told apart by any eyes
GREY, LIGHT = "#8c8c8c", "#e8e8e8"
STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text, as journals ask for
    "figure.constrained_layout.use": True,
}


@dataclass
class Analysis:
    """A table and what it means; the rows hold text and numbers, in per cent where not said."""

    name: str  # of its files
    order: int  # among all analyses, tables before figures
    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]


def publish(
    folders: Iterable[Path], analysis: Analysis, command: str, figure: Figure | None = None
) -> None:
    """Writes <name>.json and, of a figure, <name>.png and <name>.pdf; prints a Markdown table.

    Args:
        folders: usually <run_dir>/analysis of one run or several.
        analysis: what was found.
        command: with which it can be made again.
        figure: drawn under `STYLE`.
    """
    content = {
        "title": analysis.title,
        "caption": analysis.caption,
        "columns": [*analysis.columns],
        "rows": [[_plain(cell) for cell in row] for row in analysis.rows],
        "figure": f"{analysis.name}.png" if figure is not None else None,
        "command": command,
        "order": analysis.order,
    }
    # Without dates and versions the same figure is the same bytes.
    pictures = {".png": {"Software": None}, ".pdf": {"CreationDate": None}} if figure else {}
    for folder in folders:
        for suffix, undated in pictures.items():
            with atomic_write(folder / f"{analysis.name}{suffix}") as tmp:
                figure.savefig(tmp, format=suffix[1:], dpi=200, metadata=undated)
        write_json(folder / f"{analysis.name}.json", content)
    table = markdown(analysis.columns, analysis.rows)
    print(f"\n{analysis.title}\n\n{table}\n\n{analysis.caption}")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> str:
    """The table as Markdown, floats with one digit."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(text, line)) + " |" for line in lines)


def text(cell: str | int | float) -> str:
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell)


def percent(value: float | None) -> float | str:
    """A share in 0..1 in per cent, to a tenth; a dash for None."""
    return NONE if value is None else round(100 * float(value), 1)


def spread(values: np.ndarray) -> float | str:
    """The mean of several runs (lowest .. highest), or the one figure of a single run."""
    if len(values) == 1:
        return round(float(values[0]), 1)
    return f"{values.mean():.1f} ({values.min():.1f} .. {values.max():.1f})"


def paper() -> dict[str, Any]:
    """The published figures that ours are shown beside."""
    return read_json(PAPER)


def styled(draw):
    """A function that draws in the style of all figures."""
    return matplotlib.rc_context(STYLE)(draw)


def _plain(cell: Any) -> str | int | float:
    return cell.item() if isinstance(cell, np.generic) else cell
