"""Masks in the formats of other programs, read back as those programs would."""

import base64
import io
import json
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import yaml
from conftest import run_inside, sample
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from core.data.labels import read_label, write_label
from tools.exchange.formats import FORMATS
from tools.exchange.outlines import outlines, polygon_of, regions, signed_area

NAMES = ["boat", "r&d <car>"]


def filled(polygons, size) -> np.ndarray:
    """(H, W) bool of polygons, as pycocotools fills them."""
    flat = [[float(v) for point in polygon for v in point] for polygon in polygons]
    parts = [coco_mask.merge(coco_mask.frPyObjects([p], *size)) for p in flat]
    return np.any([coco_mask.decode(part) for part in parts], 0)


@pytest.mark.parametrize("density", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (23, 31)])
def test_polygons_enclose_exactly_the_region(density, size):
    """Noise has holes, holes that touch at corners, and islands in them."""
    mask = np.random.default_rng(size[0]).random(size) < density
    mask[0, 0] = True
    found = np.zeros_like(mask)
    for region in regions(mask):
        assert not found[region].any()
        assert np.array_equal(filled([polygon_of(region)], size), region)
        areas = [signed_area(loop) for loop in outlines(region)]
        assert sum(areas) == region.sum() and sum(a > 0 for a in areas) == 1
        found |= region
    assert np.array_equal(found, mask)


def test_tolerance_leaves_out_corners():
    mask = cv2.circle(np.zeros((90, 90), np.uint8), (45, 45), 40, 1, -1) > 0
    mask[40:50, 30:60] = False
    exact, rough = polygon_of(mask), polygon_of(mask, 1.0)
    near = filled([rough], mask.shape)
    assert len(rough) < len(exact) / 2 and (near & mask).sum() / (near | mask).sum() > 0.95


@pytest.fixture
def labels(tmp_path):
    """Two label maps with holes, islands and ignored pixels; one is empty. And photographs."""
    rng = np.random.default_rng(0)
    label = cv2.resize(
        rng.integers(0, 3, (6, 8), np.uint8), (48, 36), interpolation=cv2.INTER_NEAREST
    )
    label[rng.random(label.shape) < 0.05] = 0
    label[:2] = 255
    (tmp_path / "photographs/album").mkdir(parents=True)
    for name, content in {"album/one": label, "two": np.zeros_like(label)}.items():
        cv2.imwrite(
            str(tmp_path / f"photographs/{name}.jpg"), np.zeros((*label.shape, 3), np.uint8)
        )
        write_label(tmp_path / f"labels/{name}.png", content)
    (tmp_path / "labels/made_from.json").write_text(json.dumps({"classes": NAMES}))
    return tmp_path / "labels"


def exported(labels, to: str, *options: str, photographs=None):
    photographs = photographs or labels.parent / "photographs"
    output = labels.parent / "exported"
    arguments = ("--images", photographs, "--output", output, "--to", to, *options)
    return run_inside("tools/export_masks.py", labels, *arguments), output


def read_coco(folder, name, size) -> dict[str, np.ndarray]:
    coco, masks = COCO(folder / "instances.json"), {}
    (entry,) = [i for i in coco.imgs.values() if i["file_name"] == f"{name}.jpg"]
    for annotation in coco.loadAnns(coco.getAnnIds(entry["id"])):
        mask = coco.annToMask(annotation)
        assert mask.sum() == annotation["area"]
        x, y, width, height = annotation["bbox"]
        assert np.argwhere(mask).min(0).tolist() == [y, x]
        assert (np.argwhere(mask).max(0) + 1).tolist() == [y + height, x + width]
        key = coco.cats[annotation["category_id"]]["name"]
        masks[key] = masks.get(key, 0) | mask
    return masks


def joined(pairs, size) -> dict[str, np.ndarray]:
    """Masks by name from pairs of a name and a polygon."""
    polygons = {}
    for key, polygon in pairs:
        polygons.setdefault(key, []).append(polygon)
    return {key: filled(found, size) for key, found in polygons.items()}


def read_yolo(folder, name, size) -> dict[str, np.ndarray]:
    names = yaml.safe_load((folder / "data.yaml").read_text())["names"]
    rows = [line.split() for line in (folder / f"labels/{name}.txt").read_text().splitlines()]
    scale = np.array(size[::-1])
    return joined(
        (
            (names[int(k)], np.round(np.reshape(xy, (-1, 2)).astype(float) * scale, 3))
            for k, *xy in rows
        ),
        size,
    )


def read_labelme(folder, name, size) -> dict[str, np.ndarray]:
    content = json.loads((folder / f"{name}.json").read_text())
    assert (content["imageHeight"], content["imageWidth"]) == size
    assert content["imagePath"] == f"{name.rpartition('/')[2]}.jpg"
    return joined(((s["label"], s["points"]) for s in content["shapes"]), size)


def read_labelme_mask(folder, name, size) -> dict[str, np.ndarray]:
    masks = {}
    for shape in json.loads((folder / f"{name}.json").read_text())["shapes"]:
        assert shape["shape_type"] == "mask"
        (left, top), (right, bottom) = shape["points"]
        masks[shape["label"]] = np.zeros(size, bool)
        inside = np.array(Image.open(io.BytesIO(base64.b64decode(shape["mask"]))))
        masks[shape["label"]][top : bottom + 1, left : right + 1] = inside
    return masks


def read_label_studio(folder, name, size) -> dict[str, np.ndarray]:
    interface = ElementTree.parse(folder / "labels.xml")
    assert [e.get("value") for e in interface.iter("Label")] == NAMES
    tasks = json.loads((folder / "tasks.json").read_text())
    (task,) = [t for t in tasks if t["data"]["image"].endswith(f"?d={name}.jpg")]
    scale = np.array(size[::-1]) / 100
    results = (r["value"] for r in task["predictions"][0]["result"])
    return joined(
        ((r["polygonlabels"][0], np.round(np.array(r["points"]) * scale, 6)) for r in results), size
    )


def read_cvat(folder, name, size) -> dict[str, np.ndarray]:
    masks, root = {}, ElementTree.parse(folder / "annotations.xml").getroot()
    assert [e["name"] for e in json.loads((folder / "labels.json").read_text())] == NAMES
    for shape in root.find(f"image[@name='{name}.jpg']"):
        get = {k: int(shape.get(k)) for k in ("left", "top", "width", "height")}
        runs = [int(v) for v in shape.get("rle").split(",")]
        inside = np.repeat(np.arange(len(runs)) % 2, runs).reshape(get["height"], get["width"])
        mask = np.zeros(size, np.uint8)
        mask[get["top"] :, get["left"] :][: get["height"], : get["width"]] = inside
        masks[shape.get("label")] = mask
    return masks


def read_png(folder, name, size) -> dict[str, np.ndarray]:
    label, lines = read_label(folder / f"{name}.png"), (folder / "labelmap.txt").read_text()
    assert [row.split(":")[0] for row in lines.splitlines()[1:]] == ["background", *NAMES]
    return {NAMES[k - 1]: label == k for k in np.unique(label) if k}


READERS = {
    "coco": read_coco,
    "coco-rle": read_coco,
    "yolo": read_yolo,
    "labelme": read_labelme,
    "labelme-mask": read_labelme_mask,
    "cvat": read_cvat,
    "label-studio": read_label_studio,
    "png": read_png,
}


@pytest.mark.parametrize("to", FORMATS)
def test_masks_come_back_as_they_were(labels, to):
    done, folder = exported(labels, to)
    assert done.returncode == 0 and "2 images" in done.stdout, done.stderr
    for name in ("album/one", "two"):
        label = read_label(labels / f"{name}.png")
        found = READERS[to](folder, name, label.shape)
        assert {*found} == {NAMES[k - 1] for k in (1, 2) if (label == k).any()}
        for key, mask in found.items():
            assert np.array_equal(mask > 0, label == NAMES.index(key) + 1)
    done, _ = exported(labels, to)
    assert done.returncode == 1 and "is not empty; choose another --output" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
def test_masks_of_photographs_come_back(to, tmp_path):
    files = sorted(sample("voc_masks").rglob("*.png"))[:100]
    labels = tmp_path / "labels"
    (tmp_path / "photographs").mkdir()
    for path in files:
        label = read_label(path)
        write_label(labels / path.name, label)
        cv2.imwrite(str(tmp_path / f"photographs/{path.stem}.jpg"), np.zeros_like(label))
    names = [f"class{k}" for k in range(1, 21)]
    done, folder = exported(labels, to, "--classes", ",".join(names))
    assert done.returncode == 0, done.stderr
    NAMES[:], kept = names, [*NAMES]
    try:
        for path in files:
            label = read_label(path)
            found = READERS[to](folder, path.stem, label.shape)
            for k in set(np.unique(label)) - {0, 255}:
                mask, truth = found[f"class{k}"] > 0, label == k
                assert (mask & truth).sum() / (mask | truth).sum() >= 0.999
    finally:
        NAMES[:] = kept


def test_label_studio_gets_names_as_addresses(labels):
    """In an address, a plus sign is a space, and what follows a number sign is lost."""
    for folder, suffix in (("labels", "png"), ("photographs", "jpg")):
        (labels.parent / f"{folder}/two.{suffix}").rename(
            labels.parent / f"{folder}/a b+c#2.{suffix}"
        )
    done, folder = exported(labels, "label-studio")
    assert done.returncode == 0, done.stderr
    addresses = [t["data"]["image"] for t in json.loads((folder / "tasks.json").read_text())]
    assert "/data/local-files/?d=a%20b%2Bc%232.jpg" in addresses
    assert "/data/local-files/?d=album/one.jpg" in addresses


def test_bad_calls_are_refused_by_name(labels, tmp_path):
    for options, said in (
        (("--tolerance", "-1"), "at least 0"),
        (("--tolerance", "nan"), "at least 0"),
        (("--tolerance", "inf"), "at least 0"),
        (("--classes", "boat"), "2 there, 1 now"),
        (("--classes", "r&d <car>,boat"), "label 1 is 'boat' there, 'r&d <car>' now"),
        (("--classes", "boat,boat"), "twice"),
    ):
        done, _ = exported(labels, "coco", *options)
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    done, _ = exported(labels, "cvat", "--tolerance", "1")
    assert done.returncode == 1 and "cvat has none" in done.stderr
    done, _ = exported(labels, "coco", photographs=tmp_path / "none")
    assert done.returncode == 1 and "correct --images" in done.stderr
    (labels / "made_from.json").unlink()
    done, _ = exported(labels, "coco")
    assert done.returncode == 1 and "give the class names with --classes" in done.stderr
    done, _ = exported(labels, "coco", "--classes", "boat")
    assert done.returncode == 1 and "holds label 2" in done.stderr
    done, _ = exported(tmp_path / "photographs", "coco", "--classes", "boat")
    assert done.returncode == 1 and "contains no label maps" in done.stderr


@pytest.mark.parametrize(
    "content",
    [{"classes": None}, {"stage": "x"}, [1], {"classes": "boat"}, {"classes": ["boat", "boat"]}]
    + [{"classes": [1, 2]}, {"classes": []}],
)
def test_damaged_names_of_a_folder_are_refused(labels, content):
    (labels / "made_from.json").write_text(json.dumps(content))
    for options in ((), ("--classes", ",".join(NAMES))):
        done, _ = exported(labels, "coco", *options)
        assert done.returncode == 1 and "made_from.json is damaged" in done.stderr


def test_results_inside_what_is_read_are_refused(labels):
    for output in (labels / "out", labels, labels.parent / "photographs/out"):
        arguments = ("--images", labels.parent / "photographs", "--to", "png", "--output", output)
        done = run_inside("tools/export_masks.py", labels, *arguments)
        assert done.returncode == 1 and f"--output {output} is inside" in done.stderr
