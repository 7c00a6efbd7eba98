"""Makes the demo benchmark, or its pre-training corpus, in PASCAL VOC's layout.

    python tools/data/make_demo_dataset.py --root data/demo_seed0 --seed 0
    python tools/data/make_demo_dataset.py --root data/demo_corpus --corpus --train 16000 --val 500

The benchmark has 8 object classes; half of them come with a context (boat on water) in about nine
tenths of their pictures, which biases a classifier. Image n of a list depends only on (seed, n).
Writes JPEGImages, Annotations, ImageSets/Segmentation/{train,val}.txt, SegmentationClass and, for
analysis, StuffClass (maps of the textures). The corpus has tags of objects and stuff, and no masks.
"""

import sys
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.data.labels import write_label
from core.run.errors import UserError, run_script
from core.run.files import atomic_write, read_json, user_path, write_json
from tools.common import tool_parser
from tools.data.demo_world.scene import CLASSES, CORPUS_TAGS, SIZE, benchmark_scene, corpus_scene

VERSION = 1  # raise it whenever the same seed gives other pictures


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--root", type=user_path, required=True, help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=800, help="training images")
    parser.add_argument("--val", type=int, default=200, help="validation images")
    parser.add_argument("--corpus", action="store_true", help="draw the pre-training corpus")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = parser.parse_args()
    made = {"version": VERSION, "seed": options.seed, "corpus": options.corpus}
    made |= {"train": options.train, "val": options.val}
    stamp = options.root / "dataset.json"
    if stamp.exists() and read_json(stamp) == made:
        print(f"data set: {options.root} is complete")
        return
    if stamp.exists():
        raise UserError(
            f"{options.root} holds another data set ({read_json(stamp)}); choose a new --root"
        )
    for part, (name, count) in enumerate({"train": options.train, "val": options.val}.items()):
        ids = [f"{name}_{n:05d}" for n in range(count)]
        write = partial(_write, root=options.root, seed=(options.seed, part), corpus=options.corpus)
        with ProcessPoolExecutor(options.workers) as pool:
            done = pool.map(write, range(count), ids, chunksize=16)
            list(tqdm(done, total=count, desc=f"drawing {name}", unit="image"))
        with atomic_write(options.root / "ImageSets" / "Segmentation" / f"{name}.txt") as tmp:
            tmp.write_text("".join(f"{i}\n" for i in ids))
    write_json(stamp, made)
    print(f"data set: {options.train} + {options.val} images in {options.root}")


def _write(number: int, image_id: str, root: Path, seed: tuple[int, int], corpus: bool) -> None:
    cv2.setNumThreads(1)
    rng = np.random.default_rng([*seed, number])
    if corpus:
        scene, tags = corpus_scene(rng)
        objects = [(name, None) for name, shown in zip(CORPUS_TAGS, tags, strict=True) if shown]
    else:
        scene = benchmark_scene(rng)
        objects = [(CLASSES[label - 1].name, box) for label, box in scene.boxes]
        write_label(root / "SegmentationClass" / f"{image_id}.png", scene.label)
        write_label(root / "StuffClass" / f"{image_id}.png", scene.stuff)
    _write_annotation(root / "Annotations" / f"{image_id}.xml", image_id, objects)
    _, jpeg = cv2.imencode(".jpg", scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    with atomic_write(root / "JPEGImages" / f"{image_id}.jpg") as tmp:
        tmp.write_bytes(jpeg.tobytes())


def _write_annotation(path: Path, image_id: str, objects: list) -> None:
    """Writes VOC's XML: file name, size, and each object's name, difficulty and box."""
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = f"{image_id}.jpg"
    size = ElementTree.SubElement(root, "size")
    for key, value in (("width", SIZE), ("height", SIZE), ("depth", 3)):
        ElementTree.SubElement(size, key).text = str(value)
    ElementTree.SubElement(root, "segmented").text = "1"
    for name, box in objects:
        element = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(element, "name").text = name
        ElementTree.SubElement(element, "difficult").text = "0"
        if box is not None:
            bounds = ElementTree.SubElement(element, "bndbox")
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
                ElementTree.SubElement(bounds, key).text = str(value)
    ElementTree.indent(root)
    with atomic_write(path) as tmp:
        ElementTree.ElementTree(root).write(tmp, "utf-8")


if __name__ == "__main__":
    run_script(main)
