"""Exported masks, read by the programs' own code. Skipped unless that is installed:

pip install datumaro labelme label-studio-sdk
"""

import json
import os

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from test_export import NAMES, exported, labels

from core.data.labels import read_label

__all__ = ["labels"]  # the fixture
IMAGES = ("album/one", "two")


def drawn(segmentation: list, size: tuple[int, int]) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))) > 0


def same(label: np.ndarray, found: dict[str, np.ndarray]) -> None:
    """Fails unless the masks by name are those of a label map."""
    for k, name in enumerate(NAMES, 1):
        assert np.array_equal(found.get(name, np.zeros_like(label)) > 0, label == k)


def union(pairs) -> dict[str, np.ndarray]:
    found = {}
    for name, mask in pairs:
        found[name] = found[name] | mask if name in found else mask
    return found


@pytest.mark.parametrize("to", ["cvat", "coco", "coco-rle"])
def test_datumaro(labels, to):
    """CVAT reads and writes data sets with it."""
    datumaro = pytest.importorskip("datumaro")
    _, folder = exported(labels, to)
    images = folder / ("images" if to == "cvat" else "images/train")
    for name in IMAGES:
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        photograph = cv2.imread(str(labels.parent / f"photographs/{name}.jpg"))
        cv2.imwrite(str(images / f"{name}.jpg"), photograph)
    if to != "cvat":
        (folder / "annotations").mkdir()
        (folder / "instances.json").rename(folder / "annotations/instances_train.json")
    found = datumaro.Dataset.import_from(str(folder), "cvat" if to == "cvat" else "coco")
    kinds = datumaro.AnnotationType
    names = [c.name for c in found.categories()[kinds.label]]
    items = {item.id: item for item in found}
    for name in IMAGES:
        label = read_label(labels / f"{name}.png")
        shapes = items[name].annotations
        masks = [(a.label, a.image > 0) for a in shapes if a.type == kinds.mask]
        masks += [
            (a.label, drawn([a.points], label.shape)) for a in shapes if a.type == kinds.polygon
        ]
        same(label, union((names[k], mask) for k, mask in masks))


def test_labelme(labels):
    labelme = pytest.importorskip("labelme._label_file")
    from labelme.utils.shape import shapes_to_label

    _, folder = exported(labels, "labelme-mask")
    for name in IMAGES:
        label = read_label(labels / f"{name}.png")
        path = folder / f"{name}.jpg"
        cv2.imwrite(str(path), np.zeros((*label.shape, 3), np.uint8))
        shapes = labelme.LabelFile(str(path.with_suffix(".json"))).shapes
        numbers = {key: k for k, key in enumerate(NAMES, 1)}
        found, _ = shapes_to_label(label.shape, shapes, numbers)
        assert np.array_equal(found, np.where(label > 2, 0, label))


def test_label_studio(labels, tmp_path):
    """What its server exports as COCO once a person has accepted the predictions."""
    pytest.importorskip("label_studio_sdk")
    from label_studio_sdk.converter import Converter

    _, folder = exported(labels, "label-studio")
    tasks = json.loads((folder / "tasks.json").read_text())
    for number, task in enumerate(tasks, 1):
        result = task.pop("predictions")[0]["result"]
        accepted = {"id": number, "completed_by": 1, "result": result, "was_cancelled": False}
        task |= {"id": number, "annotations": [accepted], "predictions": []}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/all.json").write_text(json.dumps(tasks))
    interface = (folder / "labels.xml").read_text()
    converter = Converter(interface, project_dir=None, download_resources=False)
    output = tmp_path / "coco"
    images = os.fspath(output / "images")
    converter.convert_to_coco(os.fspath(tmp_path / "tasks"), os.fspath(output), images)
    content = json.loads((output / "result.json").read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    (number,) = [i["id"] for i in content["images"] if i["file_name"].endswith("?d=album/one.jpg")]
    label = read_label(labels / "album/one.png")
    shapes = [a for a in content["annotations"] if a["image_id"] == number]
    same(
        label,
        union((names[a["category_id"]], drawn(a["segmentation"], label.shape)) for a in shapes),
    )
