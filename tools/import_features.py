"""Turns features of other networks into the (D, h, w) files that `uss.features_dir` takes.

    python tools/import_features.py SOURCE --images PHOTOGRAPHS --output FEATURES

Reads <id>.npy, <id>.npz (one array) or <id>.pt (one tensor): (D, h, w), (h, w, D), or the tokens
(n, D) of a transformer, with or without class token and registers; each also with a batch of 1.
Which of them follows from the shapes of all files and photographs; where several fit, they are
refused. Writes <id>.npy, float16, and inputs.json, with a digest of each file of the source. A
second call continues, unless files have changed since.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.data.finder import PHOTOGRAPHS, Files, Kind
from core.data.images import TURNED, read_header
from core.run import inputs
from core.run.errors import UserError, refuse, run_script
from core.run.files import atomic_write, user_path
from core.run.threads import in_threads
from tools.common import check_outside, tool_parser
from tools.exchange.arrays import read_saved

SAVED = Kind("features", (".npy", ".npz", ".pt", ".pth"), (".pkl", ".h5", ".mat"))
SPECIAL = (0, 1, 5)
"""Tokens before the grid: none, a class token, or that and four registers."""

WIDTHS = (192, 384, 512, 768, 1024, 1280, 1536, 2048)
"""Widths of networks, which are channels rather than tokens."""

Reading = tuple[int, bool]
"""Tokens before the grid; whether the grid is a square, else it has the photograph's shape."""

SMALLEST = 4  # cells of a grid's side
PEAKS = (1e-2, 6e4)  # of a file's largest value; outside, float16 loses digits or overflows


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
    check_outside(options.output, options.source, options.images)
    paths = {name: options.output / f"{name}.npy" for name in ids}
    sources = {name: files.of_id(name) for name in ids}
    sign(options.output, options.source, sources, options.workers)
    todo = [name for name in ids if not paths[name].exists()]

    def look(name: str) -> tuple[tuple[int, ...], tuple[int, int], bool]:
        """Shape of the features, (H, W) of the photograph, and whether EXIF turns that."""
        size, orientation = read_header(photographs.of_id(name))
        if size is None:
            raise UserError(f"the size of {photographs.of_id(name)} cannot be read")
        return read_array(files.of_id(name)).shape, size, orientation in TURNED

    seen = dict(zip(ids, in_threads(look, ids, options.workers, "shapes", len(ids)), strict=True))
    flat = {}
    for name, (shape, size, _) in seen.items():
        if len(shape) == 2:
            check_axes(shape, size, files.of_id(name))
            flat[name] = shape[0], size
    reading = common_reading([*flat.values()], options.source) if flat else None

    def work(name: str) -> str:
        path, (_, size, turned) = files.of_id(name), seen[name]
        features, form = as_grid(read_array(path), size, path, reading)
        if turned and name in flat and reading and not reading[1]:
            raise UserError(
                f"{path}: its photograph is turned by EXIF, and tokens do not tell whether the "
                "network saw it turned; save (D, h, w), or turn the photograph itself"
            )
        peak = np.abs(features).max()
        if not peak:
            raise UserError(f"{path} contains nothing but zeros")
        if not PEAKS[0] <= peak <= PEAKS[1]:
            raise UserError(
                f"{path}: its values, up to {peak:.1e}, do not fit into float16; multiply the "
                "features of all images by one number, which changes no similarity"
            )
        with atomic_write(paths[name]) as tmp, tmp.open("wb") as file:
            np.save(file, features.astype(np.float16))
        return form

    done = len(ids) - len(todo)
    forms = [*in_threads(work, todo, options.workers, "features", len(ids), done)]
    for form in sorted({*forms}):
        print(f"{forms.count(form)} files read as {form}")
    print(
        f"{len(ids)} feature files in {options.output}; next: --uss.features_dir {options.output}"
    )


def sign(folder: Path, source: Path, files: Mapping[str, Path], workers: int) -> None:
    """Notes in inputs.json what the features are made from.

    Files of images without features yet may differ from those of an earlier call.

    Args:
        folder: folder of the result.
        source: folder of the other network's features.
        files: the file there of each image.
        workers: threads.

    Raises:
        UserError: the folder has features from elsewhere, or of files that have changed since.
    """
    began, old = time.time_ns(), inputs.read_stamps(folder)[1]
    items = {"source": {"folder": str(source.resolve())}, "files": dict(files)}
    stamps = inputs.stamp(items, (folder,), workers)
    written = {name for name in files if (folder / f"{name}.npy").exists()}
    lines = [*inputs.input_differences(old, stamps, {"files": written}, False)]
    lines = lines if old else ["it is not known what they were made from"]
    remedy = "choose another --output, or remove the folder"
    refuse(f"{folder} contains features made from something else", lines if written else (), remedy)
    inputs.save_stamps(folder, stamps, began)


def read_array(path: Path) -> np.ndarray:
    """The one array or tensor in a file, without batches of 1, as finite float32."""
    content = read_saved(path)
    if isinstance(content, dict) and len(content) == 1:
        content = next(iter(content.values()))
    if isinstance(content, torch.Tensor):
        if content.layout != torch.strided:
            raise UserError(f"{path} contains a sparse tensor; save tensor.to_dense()")
        content = content.detach().float().numpy()
    if not isinstance(content, np.ndarray) or content.dtype.kind != "f":
        what = (
            f"the entries {', '.join(map(str, content))}"
            if isinstance(content, dict)
            else "no floats"
        )
        raise UserError(f"{path} contains {what}; expected one array of features")
    if not np.isfinite(content).all():
        raise UserError(f"{path} contains numbers that are not finite")
    if not content.size:
        raise UserError(f"{path} is empty: its shape is {content.shape}")
    while content.ndim > 2 and len(content) == 1:
        content = content[0]
    return content.astype(np.float32)


def readings_of(count: int, size: tuple[int, int]) -> set[Reading]:
    """The ways in which so many tokens make a grid of a photograph of (H, W) pixels."""
    ways = [(special, square) for special in SPECIAL for square in (True, False)]
    return {w for w in ways if grid_of(count - w[0], (1, 1) if w[1] else size)}


def check_axes(shape: tuple[int, int], size: tuple[int, int], path: Path) -> None:
    """Refuses a (tokens, D) array of a photograph of (H, W) pixels that may be (D, tokens).

    Raises:
        UserError: the second axis could be the tokens, and has no width of a known network.
    """
    if shape[1] not in WIDTHS and readings_of(shape[1], size):
        sure = shape[0] in WIDTHS and not readings_of(shape[0], size)
        what = "seems to be (D, tokens)" if sure else "may be (tokens, D) or (D, tokens)"
        remedy = "array.T, or (D, h, w)" if sure else "(D, h, w)"
        raise UserError(f"{path} {what}, its shape is {shape}; save {remedy}")


def common_reading(found: Sequence[tuple[int, tuple[int, int]]], source: Path) -> Reading:
    """How one network's tokens are to be read: the way that fits every photograph.

    Args:
        found: for each file, its number of tokens and (H, W) of its photograph.
        source: folder of the files, for messages.

    Raises:
        UserError: there is no such way, or there are several.
    """
    common = set.intersection(*(readings_of(*pair) for pair in found))
    shapes = [max(size) / min(size) for _, size in found]
    if len({count for count, _ in found}) == 1 and max(shapes) > 1.1 * min(shapes):
        common = {way for way in common if way[1]} or common  # photographs were made square
    for special in SPECIAL:
        grids = [(grid_of(n - special, (1, 1)), grid_of(n - special, size)) for n, size in found]
        if all(square == shaped for square, shaped in grids):
            common.discard((special, False))  # the same thing
    # A square without registers is far more common than a grid that happens to fit as well.
    plain = {way for way in common if way[1] and way[0] < 5}
    common = plain if len(plain) == 1 else common
    if len(common) != 1:
        count, size = found[0]
        fits = "several ways" if common else "no way"
        raise UserError(
            f"{source}: there are {fits} to read its tokens, such as {count} for a photograph of "
            f"{size[1]}x{size[0]} pixels, as a grid; save (D, h, w)"
        )
    return next(iter(common))


def as_grid(
    array: np.ndarray, size: tuple[int, int], path: Path, reading: Reading | None = None
) -> tuple[np.ndarray, str]:
    """Features as a grid.

    Args:
        array: what was saved, see `read_array`.
        size: (H, W) of the photograph.
        path: path of the file, for messages.
        reading: of tokens, see `common_reading`.

    Returns:
        (D, h, w); and what the array was, for people.

    Raises:
        UserError: the shape fits no form, or several.
    """
    readings: dict[str, np.ndarray] = {}
    if array.ndim == 3:
        first, last = array, array.transpose(2, 0, 1)
        forms = {"(D, h, w)": first, "(h, w, D)": last}
        for fits in (lambda grid: covers(grid, size), lambda grid: grid[0] == grid[1]):
            readings = readings or {k: v for k, v in forms.items() if fits(v.shape[1:])}
        if len(readings) == 2:  # features are wider than grids are
            readings = {k: v for k, v in readings.items() if len(v) > max(v.shape[1:])}
    elif array.ndim == 2:
        special, square = reading or common_reading([(len(array), size)], path)
        grid = grid_of(len(array) - special, (1, 1) if square else size)
        if grid:
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
