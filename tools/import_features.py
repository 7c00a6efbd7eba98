"""Turns features of other networks into the (D, h, w) files that `uss.features_dir` takes.

    python tools/import_features.py SOURCE --images PHOTOGRAPHS --output FEATURES

Reads <id>.npy, <id>.npz (one array) or <id>.pt (one tensor): (D, h, w), (h, w, D), or the tokens
(n, D) of a transformer, with or without class token and registers; each also with a batch of 1.
Which of them follows from the shape and the photograph; where two fit, nothing is guessed. Writes
<id>.npy, float16. A second call continues.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.data.finder import PHOTOGRAPHS, Files, Kind
from core.data.images import read_header
from core.run.errors import UserError, run_script
from core.run.files import atomic_write, user_path
from core.run.threads import in_threads
from tools.common import tool_parser
from tools.exchange.arrays import read_saved

SAVED = Kind("features", (".npy", ".npz", ".pt", ".pth"), (".pkl", ".h5", ".mat"))
SPECIAL = ((0, True), (1, True), (0, False), (1, False), (5, True), (5, False))
"""Tokens before the grid: none, a class token, or that and four registers; and whether the grid has
the photograph's shape or is a square. The first that fits is taken."""

SMALLEST = 4  # cells of a grid's side


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("source", type=user_path, help="folder of features")
    parser.add_argument("--images", type=user_path, required=True, help="folder of photographs")
    parser.add_argument("--output", type=user_path, required=True, help="folder of feature files")
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    photographs, files = Files(options.images, PHOTOGRAPHS), Files(options.source, SAVED)
    ids = [name for name in files.ids if name in photographs.ids]
    if not ids:
        raise UserError(
            f"no photograph in {options.images} has the name of a file in {options.source}; both "
            "are compared without suffixes"
        )
    todo = [name for name in ids if not (options.output / f"{name}.npy").exists()]

    def work(name: str) -> str:
        size, orientation = read_header(photographs.of_id(name))
        if size is None:
            raise UserError(f"the size of {photographs.of_id(name)} cannot be read")
        features, form = as_grid(read_array(files.of_id(name)), size, files.of_id(name))
        with atomic_write(options.output / f"{name}.npy") as tmp, tmp.open("wb") as file:
            np.save(file, features.astype(np.float16))
        return form

    done = len(ids) - len(todo)
    forms = [*in_threads(work, todo, options.workers, "features", len(ids), done)]
    for form in sorted({*forms}):
        print(f"{forms.count(form)} files read as {form}")
    print(
        f"{len(ids)} feature files in {options.output}; next: --uss.features_dir {options.output}"
    )


def read_array(path: Path) -> np.ndarray:
    """The one array or tensor in a file, as finite float32."""
    content = read_saved(path)
    if isinstance(content, dict) and len(content) == 1:
        content = next(iter(content.values()))
    if isinstance(content, torch.Tensor):
        content = content.float().numpy()
    if not isinstance(content, np.ndarray) or content.dtype.kind != "f":
        what = f"the entries {', '.join(content)}" if isinstance(content, dict) else "no floats"
        raise UserError(f"{path} contains {what}; expected one array of features")
    if not np.isfinite(content).all():
        raise UserError(f"{path} contains numbers that are not finite")
    return content.astype(np.float32)


def as_grid(array: np.ndarray, size: tuple[int, int], path: Path) -> tuple[np.ndarray, str]:
    """Features as a grid.

    Args:
        array: what was saved.
        size: (H, W) of the photograph.
        path: path of the file, for messages.

    Returns:
        (D, h, w); and what the array was, for people.

    Raises:
        UserError: the shape fits no form, or several.
    """
    while array.ndim > 2 and len(array) == 1:
        array = array[0]
    readings: dict[str, np.ndarray] = {}
    if array.ndim == 3:
        first, last = array, array.transpose(2, 0, 1)
        forms = {"(D, h, w)": first, "(h, w, D)": last}
        for fits in (lambda grid: covers(grid, size), lambda grid: grid[0] == grid[1]):
            readings = readings or {k: v for k, v in forms.items() if fits(v.shape[1:])}
        if len(readings) == 2:  # features are wider than grids are
            readings = {k: v for k, v in readings.items() if len(v) > max(v.shape[1:])}
    elif array.ndim == 2:
        for special, shaped in SPECIAL:
            grid = grid_of(len(array) - special, size if shaped else (1, 1))
            if grid and not readings:
                tokens = array[special:].reshape(*grid, -1).transpose(2, 0, 1)
                readings[f"tokens, {special} before the grid"] = tokens
    if len(readings) != 1:
        raise UserError(
            f"{path} has the shape {array.shape}, in which no grid, or more than one, fits a "
            f"photograph of {size[1]}x{size[0]} pixels; save (D, h, w)"
        )
    form, grid = next(iter(readings.items()))
    return grid, form


def covers(grid: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Whether square cells, give or take one a side, make a photograph's shape."""
    (h, w), (height, width) = grid, size
    if min(h, w) < SMALLEST:
        return False
    return max(height / (h + 1), width / (w + 1)) < min(height / (h - 1), width / (w - 1))


def grid_of(count: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """The (h, w) of `count` cells that is nearest to a photograph's shape, if one has it."""
    pairs = [(h, count // h) for h in range(1, count + 1) if count % h == 0]
    shaped = [pair for pair in pairs if covers(pair, size)]
    if size[0] == size[1]:
        shaped = [pair for pair in shaped if pair[0] == pair[1]]
    ratio = size[0] / size[1]
    return min(shaped, key=lambda p: abs(math.log(p[0] / p[1] / ratio)), default=None)


if __name__ == "__main__":
    run_script(main)
