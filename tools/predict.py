"""Segments a folder of photographs with a trained network.

    python tools/predict.py --config configs/demo.yaml --images PHOTOGRAPHS --output RESULTS
    python tools/predict.py --weights checkpoint.pth --images PHOTOGRAPHS --output RESULTS
    python tools/predict.py --network network.onnx --images PHOTOGRAPHS --output RESULTS

The network and its class names come from the checkpoint, or from a file of tools/export_network.py;
the training data is not needed. Reads
image files anywhere below --images. Writes below --output:
    labels/<path>.png     label maps: 0 background, 1..C as named in labels/made_from.json
    overlays/<path>.jpg   the photographs with coloured and named labels
    shares.csv            for each photograph, the share of its pixels that each class covers
Images that have both are skipped, so an interrupted call continues, and images may be added. Large
photographs: --evaluation.window 512 sees them through overlapping windows. Other scales, mirroring
and the CRF: --evaluation.scales, .flip, .refine. tools/export_masks.py writes the label maps in
other formats.
"""

import csv
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.config import make_parser, parse
from core.data.finder import image_id
from core.data.labels import palette, read_label
from core.data.lists import Split, without_bad_images
from core.data.tags import find_images
from core.pipeline import Run, load_segmenter, prediction_identity, trained_weights
from core.run import distributed
from core.run.errors import UserError, run_script
from core.run.files import atomic_write
from core.run.stage import Stage
from core.segmenter import predict
from tools.common import check_outside
from tools.exchange.networks import FromFile, read_network


def main() -> None:
    parser = make_parser("predict.py", __doc__)
    parser.add_argument("--images", type=str, required=True, help="Folder of photographs.")
    parser.add_argument("--output", type=str, required=True, help="Folder of results.")
    parser.add_argument("--weights", type=str | None, help="A checkpoint; else run_dir's.")
    parser.add_argument("--network", type=str | None, help="A .onnx or .pt2 file instead.")
    config, options = parse(parser, named=False)
    images, output = Path(options.images), Path(options.output)
    check_outside(output, images)
    if options.weights and options.network:
        raise UserError("give either --weights or --network")
    if options.network:
        weights = Path(options.network)
        run, classes = read_network(weights)
        network = FromFile(run)
    else:
        weights = trained_weights(Run(config), options.weights)
        network, classes = load_segmenter(weights, config, configured=not options.weights)
    split = list_photographs(images, len(classes))
    if config.data.on_bad_image == "skip":
        split = without_bad_images(split)
    # Refuses a folder with results of another network or other settings.
    identity = prediction_identity(config, split, weights, classes)
    done = {i for i in split.ids if (output / "labels" / f"{i}.png").exists()}
    identity = replace(identity, open_inputs={"images": done})
    other = "choose another --output"
    stage = Stage(output, "predictions", config, identity, options.images, split.skipped, other)
    stage.sign(output / "labels")
    views = config.evaluation
    print(
        f"scales {', '.join(map(str, views.scales))}{', mirrored' if views.flip else ''}"
        f"{f', windows of {views.window} pixels' if views.window else ''} (--evaluation.*)"
    )
    predict(network, split, output / "labels", config.evaluation, config)
    overlays = [output / "overlays" / f"{i}.jpg" for i in split.ids]
    for k in tqdm(distributed.my_share(overlays), "overlays", unit="image"):
        label = read_label(output / "labels" / f"{split.ids[k]}.png")
        picture = overlay(split.read_image(k), label, classes)
        with atomic_write(overlays[k]) as tmp:
            Image.fromarray(picture).save(tmp, "JPEG", quality=92)
    if distributed.rank() == 0:
        write_shares(output / "shares.csv", output / "labels", split.ids, classes)
    stage.finish({"images": len(split)})
    print(f"{len(split)} label maps and overlays in {output}")


def list_photographs(folder: Path, num_classes: int) -> Split:
    """Every photograph below a folder, without tags.

    Raises:
        UserError: there is none, or two would share a result.
    """
    names = find_images(folder, "--images")
    paths = {image_id(name): folder / name for name in names}
    twice = next((name for name in names if paths[image_id(name)] != folder / name), None)
    if twice:
        raise UserError(f"{twice} and {paths[image_id(twice)]} would share a result; rename one")
    return Split(tuple(paths), tuple(paths.values()), np.zeros((len(paths), num_classes), bool))


def write_shares(path: Path, folder: Path, ids: Sequence[str], classes: Sequence[str]) -> None:
    """Writes a table of the share of pixels that background and each class cover."""
    with atomic_write(path) as tmp, tmp.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image", "background", *classes])
        for name in ids:
            label = read_label(folder / f"{name}.png", len(classes))
            counts = np.bincount(label.reshape(-1), minlength=1 + len(classes))
            table.writerow([name, *(f"{share:.4f}" for share in counts / label.size)])


def overlay(image: np.ndarray, label: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:
    """(H, W, 3) uint8 RGB: the image with coloured, outlined and named labels."""
    picture = image.copy()
    shown = label > 0
    mixed = 0.45 * image + 0.55 * palette()[label]
    picture[shown] = mixed[shown].astype(np.uint8)
    scale = max(0.35, min(image.shape[:2]) / 700)
    for c in np.unique(label[shown]):
        region = (label == c).astype(np.uint8)
        contours, _ = cv2.findContours(region, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(picture, contours, -1, (255, 255, 255), max(1, round(2 * scale)))
        inner = cv2.distanceTransform(np.pad(region, 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
        y, x = np.unravel_index(inner.argmax(), inner.shape)
        name, font = classes[c - 1], cv2.FONT_HERSHEY_SIMPLEX
        (width, height), _ = cv2.getTextSize(name, font, scale, 1)
        corner = (int(np.clip(x - width // 2, 0, max(0, image.shape[1] - width))), int(y))
        for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
            place = (corner[0], max(height, corner[1]))
            cv2.putText(picture, name, place, font, scale, colour, thickness, cv2.LINE_AA)
    return picture


if __name__ == "__main__":
    run_script(main)
