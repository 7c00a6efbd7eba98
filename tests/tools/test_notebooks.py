"""The notebook's cells, run on folders that the test makes."""

import json

import numpy as np
from conftest import CLASSES, ROOT
from PIL import Image

from core.data.labels import read_label, write_label

FOLDERS = ("IMAGES", "LABELS", "FEATURES", "OUTPUT")


def cells(name: str) -> list[dict]:
    book = json.loads((ROOT / "notebooks" / name).read_text())
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def test_notebook_is_committed_without_outputs():
    assert all(not c["outputs"] and c["execution_count"] is None for c in cells("debias.ipynb"))


def test_notebook_debiases_a_folder_of_labels(tiny_data, tmp_path):
    rng = np.random.default_rng(0)
    images, labels, features, output = folders = [tmp_path / name.lower() for name in FOLDERS]
    for folder in (images, features):
        folder.mkdir()
    for k, picture in enumerate(sorted((tiny_data / "JPEGImages").glob("*.jpg"))[:4]):
        (images / picture.name).write_bytes(picture.read_bytes())
        label = np.zeros((128, 128), np.uint8)
        label[32:96, 32:96] = 1 + k % 2
        write_label(labels / f"{picture.stem}.png", label)
        feat = 0.3 * rng.standard_normal((8, 16, 16)).astype(np.float16)
        feat[2] += 1  # context, also in the right half of the label
        feat[2, 4:12, 4:8] -= 1
        feat[k % 2, 4:12, 4:8] += 1  # the object
        np.save(features / f"{picture.stem}.npy", feat)
    first, *rest = cells("debias.ipynb")
    assert first["metadata"]["tags"] == ["parameters"]
    assert all(f"\n{name} = Path(" in "".join(first["source"]) for name in FOLDERS)
    space = dict(zip(FOLDERS, folders, strict=True))
    *most, last = rest
    for cell in most:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), space)
    *lines, shown = last["source"]
    exec(compile("".join(lines), last["id"], "exec"), space)
    picture = eval(shown, space)
    assert isinstance(picture, Image.Image) and picture.size == (3 * 128, 128)
    written = sorted(output.glob("*.png"))
    assert [p.name for p in written] == [p.name for p in sorted(labels.glob("*.png"))]
    marked = 0
    for path in written:
        before, after = read_label(labels / path.name), read_label(path, len(CLASSES))
        assert (after[before == 0] == 0).all()
        assert ((after == before) | (after == 254)).all()
        marked += (after == 254).sum()
    assert marked
