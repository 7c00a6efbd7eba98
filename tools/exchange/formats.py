"""Label maps in the formats of other programs, one class for each; written image by image."""

import base64
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from urllib.parse import quote
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from PIL import Image

from core.data.labels import BIASED_ON_DISK, palette
from core.run.errors import UserError
from core.run.files import atomic_write, write_json
from tools.exchange.outlines import polygon_of, regions, signed_area


class Format(ABC):
    """A format for label maps.

    Args:
        folder: where the files go.
        classes: names of labels 1..C.
        tolerance: see `polygon_of`.
    """

    polygons = True  # whether it has outlines, to which `tolerance` applies

    def __init__(self, folder: Path, classes: Sequence[str], tolerance: float = 0):
        self.folder, self.classes, self.tolerance = folder, classes, tolerance

    @abstractmethod
    def add(self, image_id: str, photograph: Path, label: np.ndarray) -> None:
        """Adds an image.

        Args:
            image_id: id of the image.
            photograph: path of its photograph.
            label: (H, W) uint8; 254 and 255 are left out.
        """

    @abstractmethod
    def finish(self) -> str:
        """Writes what is about all images; returns how the result is read in, for people."""

    def masks(self, label: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Label and (H, W) bool mask of each class of an image."""
        for k in np.unique(label).tolist():
            if 0 < k < BIASED_ON_DISK:
                if k > len(self.classes):
                    raise UserError(f"label {k} has no name; there are {len(self.classes)} classes")
                yield k, label == k

    def outlines(self, label: np.ndarray) -> Iterator[tuple[int, list[tuple[float, float]]]]:
        """Label and polygon of each connected region of an image."""
        for k, mask in self.masks(label):
            for region in regions(mask):
                yield k, polygon_of(region, self.tolerance)


class Coco(Format):
    """COCO's instances with polygons: one annotation for each connected region."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.images, self.annotations = [], []

    def add(self, image_id: str, photograph: Path, label: np.ndarray) -> None:
        height, width = label.shape
        number = len(self.images) + 1
        name = f"{image_id}{photograph.suffix}"
        self.images.append({"id": number, "file_name": name, "height": height, "width": width})
        for k, segmentation, area, box in self._regions(label):
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": number,
                    "category_id": k,
                    "segmentation": segmentation,
                    "area": area,
                    "bbox": box,
                    "iscrowd": 0,
                }
            )

    def _regions(self, label: np.ndarray) -> Iterator[tuple]:
        for k, polygon in self.outlines(label):
            x, y = np.array(polygon).T
            box = [float(v) for v in (x.min(), y.min(), np.ptp(x), np.ptp(y))]
            yield k, [[float(v) for v in chain(*polygon)]], abs(signed_area(polygon)), box

    def finish(self) -> str:
        categories = [{"id": k, "name": name} for k, name in enumerate(self.classes, 1)]
        content = {"images": self.images, "annotations": self.annotations, "categories": categories}
        write_json(self.folder / "instances.json", content, indent=None)
        return f"COCO's instances in {self.folder / 'instances.json'}"


class CocoRle(Coco):
    """COCO's instances with run lengths: one annotation for each class of an image."""

    polygons = False

    def _regions(self, label: np.ndarray) -> Iterator[tuple]:
        from pycocotools import mask as coco_mask

        for k, mask in self.masks(label):
            encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            box = [float(v) for v in coco_mask.toBbox(encoded)]
            segmentation = {"size": list(mask.shape), "counts": encoded["counts"].decode()}
            yield k, segmentation, float(mask.sum()), box


class Yolo(Format):
    """YOLO's segmentation text: `class x y x y ...` for each region, in shares of the sides."""

    def add(self, image_id: str, photograph: Path, label: np.ndarray) -> None:
        size = np.array(label.shape[::-1], float)
        lines = []
        for k, polygon in self.outlines(label):
            points = (np.array(polygon) / size).reshape(-1)
            lines.append(" ".join([str(k - 1), *(f"{v:.6f}" for v in points)]))
        write_text(self.folder / "labels" / f"{image_id}.txt", "\n".join([*lines, ""]))

    def finish(self) -> str:
        names = "".join(f"  {k}: {json.dumps(n)}\n" for k, n in enumerate(self.classes))
        text = f"train: images\nval: images\nnames:\n{names}"
        write_text(self.folder / "data.yaml", text)
        return (
            f"YOLO: put the photographs into {self.folder / 'images'}, which data.yaml names for "
            "training and validation alike"
        )


class Labelme(Format):
    """labelme: a JSON file for each image, to be put next to the photographs."""

    def add(self, image_id: str, photograph: Path, label: np.ndarray) -> None:
        shapes = [
            {"label": self.classes[k - 1], "group_id": None, "flags": {}, **shape}
            for k, shape in self._shapes(label)
        ]
        content = {"version": "5.0.0", "flags": {}, "shapes": shapes, "imageData": None}
        content["imagePath"] = photograph.name
        content |= {"imageHeight": label.shape[0], "imageWidth": label.shape[1]}
        write_json(self.folder / f"{image_id}.json", content, indent=None)

    def _shapes(self, label: np.ndarray) -> Iterator[tuple[int, dict]]:
        for k, polygon in self.outlines(label):
            yield k, {"shape_type": "polygon", "points": [[float(v) for v in p] for p in polygon]}

    def finish(self) -> str:
        write_text(self.folder / "labels.txt", "\n".join([*self.classes, ""]))
        return "labelme: put the files next to the photographs; open with --labels labels.txt"


class LabelmeMask(Labelme):
    """labelme's masks (5.2 and later): a PNG of its box for each class of an image."""

    polygons = False

    def _shapes(self, label: np.ndarray) -> Iterator[tuple[int, dict]]:
        for k, mask in self.masks(label):
            left, top, right, bottom = box_of(mask)
            png = io.BytesIO()
            Image.fromarray(mask[top : bottom + 1, left : right + 1]).save(png, "PNG")
            encoded = base64.b64encode(png.getvalue()).decode()
            yield (
                k,
                {
                    "shape_type": "mask",
                    "points": [[left, top], [right, bottom]],
                    "mask": encoded,
                },
            )


class Cvat(Format):
    """CVAT for images 1.1: a mask for each class of an image, as run lengths in its box."""

    polygons = False

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.images = []

    def add(self, image_id: str, photograph: Path, label: np.ndarray) -> None:
        height, width = label.shape
        lines = []
        for k, mask in self.masks(label):
            left, top, right, bottom = box_of(mask)
            runs = ", ".join(map(str, run_lengths(mask[top : bottom + 1, left : right + 1])))
            lines.append(
                f'    <mask label={quoteattr(self.classes[k - 1])} source="file" occluded="0" '
                f'rle="{runs}" left="{left}" top="{top}" width="{right - left + 1}" '
                f'height="{bottom - top + 1}" z_order="0"></mask>'
            )
        name = quoteattr(f"{image_id}{photograph.suffix}")
        start = f'  <image id="{len(self.images)}" name={name} width="{width}" height="{height}">'
        self.images.append("\n".join([start, *lines, "  </image>"]))

    def finish(self) -> str:
        labels = "".join(
            f"<label><name>{escape(name)}</name><attributes></attributes></label>"
            for name in self.classes
        )
        lines = (
            '<?xml version="1.0" encoding="utf-8"?>',
            "<annotations>",
            "  <version>1.1</version>",
            f"  <meta><task><labels>{labels}</labels></task></meta>",
        )
        text = "\n".join([*lines, *self.images, "</annotations>", ""])
        write_text(self.folder / "annotations.xml", text)
        colours = palette()
        labels = [
            {"name": n, "color": "#{:02x}{:02x}{:02x}".format(*colours[k]), "attributes": []}
            for k, n in enumerate(self.classes, 1)
        ]
        write_json(self.folder / "labels.json", labels)
        return (
            'CVAT: make a task with the labels of labels.json ("Raw"), then "Upload annotations", '
            '"CVAT 1.1", annotations.xml'
        )


class LabelStudio(Format):
    """Label Studio: tasks with a polygon for each region, in per cent of the sides."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.tasks = []

    def add(self, image_id: str, photograph: Path, label: np.ndarray) -> None:
        height, width = label.shape
        results = []
        for k, polygon in self.outlines(label):
            points = [[100 * x / width, 100 * y / height] for x, y in polygon]
            results.append(
                {
                    "id": f"{len(self.tasks)}-{len(results)}",
                    "type": "polygonlabels",
                    "from_name": "label",
                    "to_name": "image",
                    "original_width": width,
                    "original_height": height,
                    "image_rotation": 0,
                    "value": {
                        "closed": True,
                        "points": points,
                        "polygonlabels": [self.classes[k - 1]],
                    },
                }
            )
        url = f"/data/local-files/?d={quote(image_id + photograph.suffix)}"
        self.tasks.append({"data": {"image": url}, "predictions": [{"result": results}]})

    def finish(self) -> str:
        write_json(self.folder / "tasks.json", self.tasks, indent=None)
        labels = "\n".join(f"    <Label value={quoteattr(name)}/>" for name in self.classes)
        image = '  <Image name="image" value="$image"/>'
        start = '  <PolygonLabels name="label" toName="image">'
        lines = ("<View>", image, start, labels, "  </PolygonLabels>", "</View>", "")
        write_text(self.folder / "labels.xml", "\n".join(lines))
        return (
            "Label Studio: paste labels.xml as the labelling interface, add the photographs as "
            "local storage, and import tasks.json"
        )


class Png(Format):
    """Indexed PNGs of class numbers, and a table of their colours (CVAT's and Roboflow's)."""

    polygons = False

    def add(self, image_id: str, photograph: Path, label: np.ndarray) -> None:
        image = Image.fromarray(np.where(label >= BIASED_ON_DISK, 0, label).astype(np.uint8))
        image.putpalette(palette().tobytes())
        with atomic_write(self.folder / f"{image_id}.png") as tmp:
            image.save(tmp, "PNG")

    def finish(self) -> str:
        colours = palette()
        rows = [
            "{}:{},{},{}::".format(name, *colours[k])
            for k, name in enumerate(["background", *self.classes])
        ]
        text = "\n".join(["# label:color_rgb:parts:actions", *rows, ""])
        write_text(self.folder / "labelmap.txt", text)
        return f"class numbers in {self.folder}; labelmap.txt has their names and colours"


FORMATS: dict[str, Callable[..., Format]] = {
    "coco": Coco,
    "coco-rle": CocoRle,
    "yolo": Yolo,
    "labelme": Labelme,
    "labelme-mask": LabelmeMask,
    "cvat": Cvat,
    "label-studio": LabelStudio,
    "png": Png,
}


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a mask that is not empty; the last two belong to it."""
    y, x = mask.nonzero()
    return int(x.min()), int(y.min()), int(x.max()), int(y.max())


def run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of a mask along its rows, the first of them outside."""
    edges = np.flatnonzero(np.diff(mask.reshape(-1), prepend=False))
    return np.diff([0, *edges, mask.size]).tolist()


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, completely or not at all."""
    with atomic_write(path) as tmp:
        tmp.write_text(text, "utf-8")
