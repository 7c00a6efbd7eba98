"""Drawn data sets in the structure of VOC's and COCO's, for tests that also run on real ones."""

import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from core.data.labels import palette
from core.data.settings import VOC_CLASSES

COCO_IDS = sorted({*range(1, 91)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})


def draw_voc(root: Path) -> Path:
    """40 pictures of odd sizes on the list `val_photos`, each with one to three of VOC's classes,
    masks with borders of 255, and `tags.csv`."""
    rng, tags = np.random.default_rng(0), ["image,tags"]
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    names = [f"2007_{k:06}" for k in range(40)]
    for k, name in enumerate(names):
        height, width = rng.integers(60, 130, 2).tolist()
        mask = np.zeros((height, width), np.uint8)
        for label in (*rng.integers(1, 21, k % 3).tolist(), k % 20 + 1):
            centre = [int(side * rng.uniform(0.3, 0.7)) for side in (width, height)]
            shape = (centre, rng.integers(12, 25, 2).tolist(), int(rng.integers(180)), 0, 360)
            cv2.ellipse(mask, *shape, label, -1)
            cv2.ellipse(mask, *shape, 255, 2)
        shown = np.unique(mask[(mask > 0) & (mask < 255)])
        tags.append(f"{name},{' '.join(VOC_CLASSES[label - 1] for label in shown)}")
        picture = palette()[mask] // 2 + rng.integers(0, 99, (height, width, 3), np.uint8)
        Image.fromarray(picture).save(root / f"JPEGImages/{name}.jpg")
        image = Image.fromarray(mask)
        image.putpalette(palette().tobytes())
        image.save(root / f"SegmentationClass/{name}.png")
    (root / "ImageSets/Segmentation/val_photos.txt").write_text("\n".join(names))
    (root / "tags.csv").write_text("\n".join(tags))
    return root


def draw_coco(root: Path) -> Path:
    """24 pictures and `instances.json` with COCO's 80 ids in any order: polygons of one or two
    parts, crowds as run lengths, and pictures without annotations."""
    rng, images, annotations = np.random.default_rng(0), [], []
    (root / "images").mkdir()
    (root / "annotations").mkdir()
    for k in range(24):
        height, width = rng.integers(450, 640, 2).tolist()
        name = f"{k + 1:012}.jpg"
        images.append({"id": k + 1, "file_name": name, "height": height, "width": width})
        Image.new("RGB", (width, height), tuple(rng.integers(0, 255, 3))).save(
            root / "images" / name
        )
        for part in range(0 if k % 6 == 5 else 4):
            count = len(annotations)
            entry = {"id": count + 1, "image_id": k + 1, "category_id": COCO_IDS[count % 80]}
            entry["iscrowd"] = int(count % 7 == 6)
            corners = _star(rng, width * (0.3 + 0.4 * (part % 2)), height * (0.3 + 0.2 * part))
            polygons = [corners] if part else [corners, _star(rng, width * 0.8, height * 0.8)]
            entry["segmentation"] = [np.round(p, 2).ravel().tolist() for p in polygons]
            entry["area"] = float(sum(cv2.contourArea(p.astype(np.float32)) for p in polygons))
            if entry["iscrowd"]:
                inside = np.zeros((height, width), np.uint8)
                cv2.fillPoly(inside, [p.astype(np.int32) for p in polygons], 1)
                column = inside.T.ravel()
                edges = np.flatnonzero(np.diff(column, prepend=0, append=1 - column[-1]))
                runs = np.diff(edges, prepend=0).tolist()
                entry["segmentation"] = {"size": [height, width], "counts": runs}
            annotations.append(entry)
    categories = [{"id": i, "name": f"thing {i}"} for i in rng.permutation(COCO_IDS).tolist()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations/instances.json").write_text(json.dumps(content))
    return root


def _star(rng: np.random.Generator, x: float, y: float) -> np.ndarray:
    """(9, 2) corners around a centre."""
    angles, radii = np.sort(rng.uniform(0, 2 * np.pi, 9)), rng.uniform(45, 135, 9)
    return np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], 1)
