"""Writes features of the training images as <id>.npy files, (D, h, w) float16.

    python tools/export_features.py --config configs/demo.yaml --source classifier --output DIR

Sources: uss (stage 1's network) or classifier (the deepest features of stage 2's classifier, the
paper's negative control: they do not distinguish a class from its context). `uss.features_dir`
takes such a folder, from this tool or any other.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from torch import nn

from core.config import Config, make_parser, parse
from core.data.features import write_features
from core.data.lists import Split, read_split
from core.pipeline import Run, check_made_from, load_semantic_features, settings_of
from core.run import checkpoint
from core.run.device import autocast, pick_device, to_device
from core.run.errors import run_script
from core.run.stage import Identity, Stage
from core.uss.features import network_features
from core.wsss.settings import METHODS
from train_wsss import build_classifier


def main() -> None:
    parser = make_parser("export_features.py", __doc__)
    parser.add_argument("--source", type=Literal["uss", "classifier"], default="uss")
    parser.add_argument("--output", type=str, required=True, help="output folder")
    config, options = parse(parser)
    run, split, device = Run(config), read_split(config.data, "train"), pick_device(config)
    if options.source == "classifier":
        classifier = to_device(load_classifier(config, run), device)
        network = lambda images: classifier.backbone(images)[-1]  # noqa: E731
    else:
        network = load_semantic_features(config).to(device)
    source = network_features(network, split, device, autocast(config, device))
    folder = Path(options.output)
    identity = features_identity(config, split, options.source)
    stage = Stage(
        folder, "features", config, identity, config.data.root, elsewhere="choose another --output"
    )
    stage.sign(folder)
    write_features(source, split, folder)
    stage.finish({})
    print(f"{len(split)} feature files in {options.output}")


def features_identity(config: Config, split: Split, source: str) -> Identity:
    """Identity of the files: the images and the network."""
    section = "uss" if source == "uss" else "wsss"
    weights = Run(config).folder / section / "checkpoint.pth"
    inputs = {"images": dict(zip(split.ids, split.images, strict=True))}
    inputs["network"] = {"checkpoint": weights}
    settings = settings_of(config, section)
    return Identity(config.data.classes, settings, inputs, named=False)


def load_classifier(config: Config, run: Run) -> nn.Module:
    """Stage 2's classifier, or its EMA teacher where the method has one."""
    blank = replace(config.wsss, backbone=config.wsss.backbone.without_weights())
    classifier = build_classifier(blank, len(config.data.classes))
    key = "ema" if METHODS[config.wsss.method].teacher else "network"
    path = run.wsss / "checkpoint.pth"
    content = checkpoint.load(path)
    check_made_from(path, content, "wsss", config, named=True)
    return checkpoint.restore(classifier, content, key, path)


if __name__ == "__main__":
    run_script(main)
