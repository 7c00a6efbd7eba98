"""What each stage reads, where every artefact of an experiment is, and how stages find each other.

<run_dir>/uss/checkpoint.pth                      the features' network
<run_dir>/wsss/checkpoint.pth, cams/, labels/     classifier, activation maps, pseudo labels
<run_dir>/wsss/seeds/, pairs/                     what propagates the maps (not cam)
<run_dir>/debias/centroids.npz, labels/           debiased centroids and labels
<run_dir>/segmentation/<name>/checkpoint.pth      student and EMA teacher
<run_dir>/evaluation/<name>/scores.json, predictions/
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from core.config import Config
from core.data.features import FeatureSource, feature_files, file_features
from core.data.finder import FEATURES, LABELS, Files, Kind
from core.data.lists import Split, masks_folder
from core.models.deeplab import DeepLab, build_deeplab
from core.run import checkpoint
from core.run.errors import refuse
from core.run.files import read_json
from core.run.inputs import Items
from core.run.settings import check, flatten, is_weight_file, keys_in_use, overlaid, weight_files
from core.run.stage import STALE, Identity, class_differences, setting_differences, stale_lines
from core.segmenter import SegmentationConfig
from core.uss.features import SemanticFeatures, network_features, standardised_source


class Run:
    """The paths of one experiment."""

    def __init__(self, config: Config):
        self.config = config
        self.folder = Path(config.run_dir)
        self.uss, self.wsss = self.folder / "uss", self.folder / "wsss"
        self.wsss_labels = Path(config.wsss.labels_dir or self.wsss / "labels")
        self.debias = Path(config.debias.output_dir or self.folder / "debias")

    def segmentation(self, name: str | None = None) -> Path:
        """Folder of one segmentation training; by default the configured one."""
        section = self.config.segmentation
        return self.folder / "segmentation" / (name or section.name or section.mode)

    @property
    def labels_to_train_on(self) -> Path:
        """Folder of the label maps that the configured mode of stage 4 trains on."""
        section = self.config.segmentation
        if section.mode == "supervised":
            return masks_folder(self.config.data) or Path()
        if section.labels_dir:
            return Path(section.labels_dir)
        return self.wsss_labels if section.mode == "wsss" else self.debias / "labels"

    def evaluation(self, name: str) -> Path:
        """Folder of one evaluation."""
        return self.folder / "evaluation" / name


def paths_of(folder: Path, kind: Kind, split: Split) -> list[Path]:
    """The file of each image in a folder, whether or not it exists."""
    return [*map(Files(folder, kind).of_id, split.ids)]


@cache
def _defaults() -> dict[str, Any]:
    return flatten(dataclasses.asdict(Config()))


def settings_of(config: Config, *keys: str) -> dict[str, Any]:
    """Flat settings in use of sections, and plain keys; weight files count as inputs instead."""
    flat: dict[str, Any] = {}
    for key in keys:
        value = getattr(config, key)
        flat |= keys_in_use(value, f"{key}.") if dataclasses.is_dataclass(value) else {key: value}
    return {key: value for key, value in flat.items() if not is_weight_file(key, value)}


def _identity(
    config: Config,
    keys: Sequence[str],
    inputs: dict[str, Items],
    classes: tuple[str, ...] | None = None,
    named: bool = True,
) -> Identity:
    """The identity of a stage that uses these sections and keys, and the weight files they name;
    `classes` None: the configured ones."""
    sections = [k for k in keys if dataclasses.is_dataclass(getattr(config, k))]
    weights = {k: v for s in sections for k, v in weight_files(getattr(config, s), f"{s}.").items()}
    inputs = inputs | ({"weights": weights} if weights else {})
    run, settings = Run(config), settings_of(config, *keys)
    known = (run.uss, run.wsss, run.debias, run.segmentation())
    classes = config.data.classes if classes is None else classes
    return Identity(classes, settings, inputs, named, known_in=known, defaults=_defaults())


def _by_id(split: Split, values: Iterable[Path | str]) -> Items:
    return dict(zip(split.ids, values, strict=True))


def _images_and_tags(config: Config, split: Split) -> dict[str, Items]:
    names = config.data.classes
    tags = (";".join(names[k] for k in row.nonzero()[0]) for row in split.tags)
    return {"images": _by_id(split, split.images), "tags": _by_id(split, tags)}


def uss_identity(config: Config, split: Split) -> Identity:
    """Stage 1 sees images alone."""
    return _identity(config, ("seed", "uss"), {"images": _by_id(split, split.images)}, named=False)


def wsss_identity(config: Config, split: Split) -> Identity:
    """Stage 2 sees images and their tags."""
    keys = ("seed", "accumulate", "sync_norm", "wsss")
    return _identity(config, keys, _images_and_tags(config, split))


def debias_identity(config: Config, split: Split) -> Identity:
    """Stage 3 sees images, tags, label maps, and features or the network that computes them."""
    run, folder = Run(config), config.uss.features_dir
    inputs = _images_and_tags(config, split)
    inputs["labels"] = _by_id(split, paths_of(run.wsss_labels, LABELS, split))
    if not folder:  # stage 1's checkpoint tells what becomes of its features
        inputs["features"] = {"checkpoint": run.uss / "checkpoint.pth"}
        return _identity(config, ("seed", "debias"), inputs)
    inputs["features"] = _by_id(split, paths_of(Path(folder), FEATURES, split))
    identity = _identity(config, ("seed", "debias"), inputs)
    of_files = {f"uss.{key}": getattr(config.uss, key) for key in ("centre", "whiten")}
    return dataclasses.replace(identity, settings={**identity.settings, **of_files})


def segmentation_identity(config: Config, split: Split, labels: Sequence[Path]) -> Identity:
    """Stage 4 sees images and label maps; the teacher also sees tags."""
    inputs = {"images": _by_id(split, split.images), "labels": _by_id(split, labels)}
    if config.segmentation.mode in ("complement", "mars") or config.segmentation.class_balance:
        inputs |= _images_and_tags(config, split)
    return _identity(config, ("seed", "accumulate", "sync_norm", "segmentation"), inputs)


def prediction_identity(
    config: Config, split: Split, weights: Path, classes: tuple[str, ...]
) -> Identity:
    """Predictions see images and the trained network, whose checkpoint holds its own settings."""
    inputs = {"images": _by_id(split, split.images), "network": {"checkpoint": weights}}
    return _identity(config, ["evaluation"], inputs, classes=classes)


def own_stages(config: Config, split: Split, *stages: str) -> Iterator[tuple[Path, Identity, str]]:
    """Folder, present identity and script of each named stage whose results are the run's own.

    `split` is the training list, `stages` any of "uss", "wsss" and "debias".
    """
    run = Run(config)
    if "wsss" in stages and not config.wsss.labels_dir:
        yield run.wsss, wsss_identity(config, split), "train_wsss.py"
    if "uss" in stages and not config.uss.features_dir:
        yield run.uss, uss_identity(config, split), "train_uss.py"
    if "debias" in stages:
        yield run.debias, debias_identity(config, split), "make_debiased_labels.py"


def check_upstream(config: Config, split: Split, *stages: str) -> None:
    """Compares what earlier stages were made from with what they would be made from now; see
    `own_stages`.

    Raises:
        UserError: they differ, so that the results would not be of these settings and inputs.
    """
    for folder, identity, script in own_stages(config, split, *stages):
        refuse(
            f"{folder}, which this stage reads, {STALE}",
            stale_lines(folder, identity, config.workers),
            "set these back, or choose another run_dir or remove the folder yourself, and run: "
            f"python {script}, with the same --config and options",
        )


def check_made_from(
    path: Path, content: Mapping[str, Any], section: str, config: Config, named: bool = False
) -> None:
    """Compares the loaded content of our checkpoint `path` with a section of the configuration.

    `named`: whether the network distinguishes classes, so that their names and order count.

    Raises:
        UserError: it was made with other settings of the section, or for other classes.
    """
    made = content.get("made_from")
    if made is None:
        return
    there = _settings_there(path, made, section)
    lines = setting_differences(there, settings_of(config, section), _defaults())
    if named and config.data.classes:
        lines = class_differences(made["classes"], config.data.classes) + lines
    refuse(
        f"the network in {path} was made with other settings",
        lines,
        "give the --config and options of the run that made it, or train again in another run_dir",
    )


def _settings_there(path: Path, made_from: Mapping[str, Any], section: str) -> dict[str, Any]:
    there = {k: v for k, v in made_from["settings"].items() if k.startswith(f"{section}.")}
    stage = made_from["stage"]
    check(any(there), f"{path} is the checkpoint of {stage}; here one of {section} is needed")
    return there


def load_semantic_features(config: Config) -> SemanticFeatures:
    """The network that stage 1 trained; in evaluation mode."""
    path = Run(config).uss / "checkpoint.pth"
    content = checkpoint.load(path)
    check_made_from(path, content, "uss", config)
    blank = dataclasses.replace(config.uss, backbone=config.uss.backbone.without_weights())
    return checkpoint.restore(SemanticFeatures(blank), content, "network", path)


def feature_source(
    config: Config, split: Split, device: torch.device, amp: torch.autocast
) -> FeatureSource:
    """The configured features: files from elsewhere, stage 1's files, or its network."""
    if config.uss.features_dir:
        source = file_features(feature_files(Path(config.uss.features_dir), split))
        standard = config.uss.centre or config.uss.whiten
        return standardised_source(source, len(split), config.uss.whiten) if standard else source
    if config.uss.cache:
        return file_features(feature_files(Run(config).uss / "features", split, "run train_uss.py"))
    return network_features(load_semantic_features(config).to(device), split, device, amp)


def trained_weights(run: Run, chosen: str | None = None) -> Path:
    """The checkpoint that a user chose, or that of the configured training.

    Raises:
        UserError: it is missing, or the training has not finished.
    """
    if chosen:
        check(Path(chosen).is_file(), f"checkpoint {chosen} is missing; correct --weights")
        return Path(chosen)
    weights = run.segmentation() / "checkpoint.pth"
    done = weights.is_file() and read_json(weights.with_name("manifest.json"))["finished"]
    check(done, f"{weights.parent} holds no finished training; run train_segmentation.py")
    return weights


def load_segmenter(
    weights: Path, config: Config, configured: bool = False
) -> tuple[DeepLab, tuple[str, ...]]:
    """The EMA teacher of a training, which is what a user deploys, and the names of its classes.

    A checkpoint states which network it contains and what its labels are called, so the training
    data is not needed; one that does not is assumed to contain the configured network.

    `configured`: refuse a network that was trained with other settings or for other classes.
    """
    content = checkpoint.load(weights)
    if configured:
        check_made_from(weights, content, "segmentation", config, named=True)
    settings, classes = config.segmentation, config.data.classes
    made_from = content.get("made_from")
    if made_from is not None:
        settings = _settings_there(weights, made_from, "segmentation")
        settings = overlaid(SegmentationConfig(), settings, "segmentation.")
        classes = tuple(made_from["classes"])
    blank = dataclasses.replace(settings, backbone=settings.backbone.without_weights())
    return checkpoint.restore(build_deeplab(blank, len(classes)), content, "ema", weights), classes
