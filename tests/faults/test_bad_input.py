"""Every kind of bad input that we could think of, given to the scripts as a user would give it.

Each is refused in one message that names what is wrong, without a traceback, and leaves no
unfinished file behind. Minutes long, so run by tools/test.sh --all; docs/reliability.md lists the
kinds.
"""

import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CLASSES, ROOT, tiny_config
from PIL import Image

FIRST = "train_00000"
LABELS = ("make_debiased_labels.py",)


class Box:
    """A data set, labels, features and a configuration of one's own to break."""

    def __init__(self, data: Path, folder: Path):
        self.folder, self.data, self.options = folder, folder / "data", []
        shutil.copytree(data, self.data)
        self.settings = tiny_config(self.data, folder / "run")
        self.settings["uss"]["method"] = "frozen"
        self.config = folder / "tiny.yaml"

    def use(self, section: str, **values) -> None:
        self.settings[section] = {**self.settings.get(section, {}), **values}

    @property
    def image(self) -> Path:
        return self.data / "JPEGImages" / f"{FIRST}.jpg"

    @property
    def annotation(self) -> Path:
        return self.data / "Annotations" / f"{FIRST}.xml"

    @property
    def train_list(self) -> Path:
        return self.data / "ImageSets/Segmentation/train.txt"

    def ids(self, which: str = "train") -> list[str]:
        return (self.data / f"ImageSets/Segmentation/{which}.txt").read_text().split()

    def folder_of_labels(self, make: Callable[[str], np.ndarray] | None = None) -> Path:
        """Somebody's pseudo labels: the masks, or what `make` gives."""
        labels = self.folder / "labels"
        shutil.copytree(self.data / "SegmentationClass", labels, dirs_exist_ok=True)
        for name in self.ids() if make else ():
            Image.fromarray(make(name)).save(labels / f"{name}.png")
        self.use("wsss", labels_dir=str(labels))
        return labels / f"{FIRST}.png"

    def folder_of_features(self) -> Path:
        """Somebody's features."""
        folder = self.folder / "features"
        folder.mkdir()
        for k, name in enumerate(self.ids()):
            rng = np.random.default_rng(k)
            np.save(folder / f"{name}.npy", rng.normal(size=(4, 8, 8)).astype(np.float32))
        self.use("uss", features_dir=str(folder))
        return folder / f"{FIRST}.npy"

    def photographs(self) -> Path:
        """A folder of photographs with a table of tags instead of VOC's layout."""
        root = self.folder / "photos"
        shutil.copytree(self.data / "JPEGImages", root)
        rows = "".join(f"{name}.jpg,boat\n" for name in self.ids())
        (root / "tags.csv").write_text("image,tags\n" + rows)
        self.use("data", format="folder", root=str(root), tags="tags.csv", classes=["boat", "car"])
        self.settings["data"].pop("biased_classes")
        return root

    def run(self, script: str, **limits) -> subprocess.CompletedProcess:
        if not self.config.exists():
            self.config.write_text(yaml.safe_dump(self.settings))
        command = [
            sys.executable,
            script,
            *(["--config", self.config] if self.takes(script) else []),
        ]

        def limit() -> None:
            for name, value in limits.items():
                resource.setrlimit(getattr(resource, name), (value, value))

        return subprocess.run(
            [*map(str, command), *map(str, self.options)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            preexec_fn=limit,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def takes(self, script: str) -> bool:
        return not script.startswith("tools/data/prepare") and "--masks" not in self.options


@dataclass
class Case:
    """One kind of bad input."""

    told: str  # how docs/reliability.md calls it
    script: str
    message: str  # a regular expression
    spoil: Callable[[Box], object]
    limits: dict | None = None


def png(**options) -> Callable[[Path], None]:
    return lambda path: Image.new(**options).save(path)


def broken(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def weights(box: Box, content: object) -> None:
    path = box.folder / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    box.settings["uss"]["backbone"]["weights"] = str(path)


class Code:
    """What unpickling must not run."""

    def __reduce__(self):
        return (os.system, ("touch /dev/null",))


def archive(box: Box, make: Callable[[Path], object]) -> None:
    path = box.folder / "voc.tar"
    make(path)
    box.options = ["--voc", path, "--output", box.folder / "VOC2012"]


def climbing_archive(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        file.add(__file__, "VOCdevkit/VOC2012/JPEGImages/../../../../escaped.jpg")


def instances(box: Box, content: str) -> None:
    folder = box.folder / "coco/annotations"
    folder.mkdir(parents=True)
    for split in ("train2014", "val2014"):
        (folder / f"instances_{split}.json").write_text(content)
    box.options = ["--root", box.folder / "coco"]


def predictions(box: Box, spoil: Callable[[Path], object] = lambda path: None, *options) -> None:
    folder = box.folder / "predictions"
    shutil.copytree(box.data / "SegmentationClass", folder)
    for path in folder.iterdir():
        label = np.array(Image.open(path))
        label[label == 255] = 0
        Image.fromarray(label).save(path)
    spoil(folder)
    box.options = ["--predictions", folder, "--split", "val", *options]


def option(*arguments: str) -> Callable[[Box], None]:
    return lambda box: box.options.extend(arguments)


def change(**values) -> Callable[[Box], None]:
    return lambda box: box.settings.update(values)


def label(make: Callable[[Path], object]) -> Callable[[Box], None]:
    def spoil(box: Box) -> None:
        box.folder_of_features()
        make(box.folder_of_labels())

    return spoil


def labels_of(*values: int) -> Callable[[Box], None]:
    def spoil(box: Box) -> None:
        box.folder_of_features()
        rows = np.array(values, np.uint8).repeat(128 // len(values))
        box.folder_of_labels(lambda name: rows[:, None].repeat(128, 1))

    return spoil


def objects_alone(box: Box) -> None:
    """Every label map is all of one class that its photograph shows."""
    box.folder_of_features()
    masks = box.data / "SegmentationClass"

    def make(name: str) -> np.ndarray:
        mask = np.array(Image.open(masks / f"{name}.png"))
        return np.full_like(mask, mask[(mask > 0) & (mask < 255)].max())

    box.folder_of_labels(make)


def renumbered(path: Path) -> None:
    for other in path.parent.glob("*.png"):
        values = np.array(Image.open(other))
        values[(values > 0) & (values < 255)] %= len(CLASSES)
        values[values < 255] += np.array(Image.open(other))[values < 255] > 0
        Image.fromarray(values).save(other)


def contradictory(path: Path) -> None:
    image = Image.fromarray(np.arange(128 * 128, dtype=np.uint8).reshape(128, 128) % 3)
    image.putpalette([0, 0, 0, 0, 128, 0, 0, 128, 0])
    image.save(path)


def jpeg(path: Path) -> None:
    Image.open(path).convert("L").save(path, "JPEG")


def lying(box: Box) -> Callable[[Path], object]:
    """A photograph that is stored on its side, with a label map that is, too."""

    def make(path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(box.image).resize((128, 96)).save(box.image, exif=exif)
        Image.open(path).resize((128, 96), Image.Resampling.NEAREST).save(path)

    return make


def reshaped(*shape: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        for other in path.parent.glob("*.npy"):
            np.save(other, np.load(other).reshape(shape))

    return make


def archived(path: Path) -> None:
    array = np.load(path)
    with path.open("wb") as file:
        np.savez(file, array)


def feature(make: Callable[[Path], object]) -> Callable[[Box], None]:
    def spoil(box: Box) -> None:
        box.folder_of_labels()
        make(box.folder_of_features())

    return spoil


def table(text: str | bytes) -> Callable[[Box], None]:
    def spoil(box: Box) -> None:
        path = box.photographs() / "tags.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return spoil


def made_before(box: Box) -> None:
    assert box.run("train_uss.py").returncode == 0
    box.options = ["--uss.flip=false"]


def broken_manifest(box: Box) -> None:
    assert box.run("train_uss.py").returncode == 0
    broken(box.folder / "run/uss/manifest.json")


def in_the_way(box: Box) -> None:
    (box.folder / "run").write_text("a file")


def all_photographs(box: Box, make: Callable[[Path], object]) -> None:
    root = box.photographs()
    make(root)


USS, WSSS, SEGMENT, SCORE = (
    *("train_uss.py", "train_wsss.py"),
    *("train_segmentation.py", "evaluate.py"),
)
DEBIAS, VOC, COCO = (
    "make_debiased_labels.py",
    "tools/data/prepare_voc.py",
    "tools/data/prepare_coco.py",
)
ONE = "image,tags\n"

CASES = [
    # Configuration
    Case("misspelt setting", USS, "did you mean `debias.alpha`", option("--debias.alhpa=0.4")),
    Case("value of the wrong type", USS, "debias.alpha", option("--debias.alpha=much")),
    Case("value out of range", USS, "alpha", option("--debias.alpha=1.5")),
    Case("unknown choice", USS, "uss.method", option("--uss.method=magic")),
    Case("negative seed", USS, "seed", option("--seed=-1")),
    Case("unknown device", USS, "device 'abacus' is unknown", option("--device=abacus")),
    Case("GPU requested but absent", USS, "sees no GPU", option("--device=cuda")),
    Case("class named twice", USS, "names a class twice", option("--data.classes=[a, a]")),
    Case(
        "biased class that is not a class",
        *(USS, "which data.classes lacks", option("--data.biased_classes=[rails]")),
    ),
    Case("configuration missing", USS, "no.yaml", option("--config=no.yaml")),
    Case("configuration is a folder", USS, "configs", option("--config=configs")),
    Case("configuration is not YAML", USS, "error", lambda b: b.config.write_text("a: [1,\n b: {")),
    Case("configuration is a list", USS, "error", lambda b: b.config.write_text("- seed: 3\n")),
    Case(
        "configuration is not UTF-8", USS, "UTF-8", lambda b: b.config.write_bytes(b"seed: \xff3\n")
    ),
    Case(
        "misspelt section in the file",
        *(USS, "there is no setting", change(debiasing={"alpha": 0.4})),
    ),
    # Weights
    Case(
        "unknown network",
        *(USS, "timm knows|timm.list_models", option("--uss.backbone.name=vit_tiny_patch99")),
    ),
    Case("weights missing", USS, "gone.pth", option("--uss.backbone.weights=gone.pth")),
    Case("weights empty", USS, "cannot be read", lambda b: weights(b, b"")),
    Case("weights are text", USS, "cannot be read", lambda b: weights(b, b"some text")),
    Case(
        "weights of another network",
        *(USS, "lacks .* tensors", lambda b: weights(b, {"conv1.weight": torch.ones(3)})),
    ),
    Case(
        "weights contain code",
        *(USS, "cannot be read|lacks", lambda b: weights(b, pickle.dumps({"a": Code()}))),
    ),
    # Data set
    Case("data set missing", USS, "nowhere", option("--data.root=nowhere")),
    Case("list missing", USS, "the list .* is missing", lambda b: b.train_list.unlink()),
    Case("list empty", USS, "is empty", lambda b: b.train_list.write_text("\n")),
    Case("list is not UTF-8", USS, "UTF-8", lambda b: b.train_list.write_bytes(b"caf\xe9\n")),
    Case(
        "duplicate id in the list",
        *(USS, "twice", lambda b: b.train_list.write_text(f"{FIRST}\n{FIRST}\n")),
    ),
    Case(
        "id that points outside the folder",
        *(USS, "not a plain path", lambda b: b.train_list.write_text("../../etc/passwd\n")),
    ),
    Case("photograph missing", USS, f"{FIRST}.jpg is missing", lambda b: b.image.unlink()),
    Case("photograph of 0 bytes", USS, "cannot be decoded", lambda b: b.image.write_bytes(b"")),
    Case("photograph truncated", USS, "cannot be decoded", lambda b: broken(b.image)),
    Case("photograph is text", USS, "cannot be decoded", lambda b: b.image.write_text("a cat")),
    Case(
        "photograph of 400 million pixels",
        *(USS, "over 100 million", lambda b: Image.new("L", (20_000, 20_000)).save(b.image, "PNG")),
    ),
    Case("annotation missing", WSSS, FIRST, lambda b: b.annotation.unlink()),
    Case("annotation broken", WSSS, "cannot be read", lambda b: broken(b.annotation)),
    Case(
        "annotation with an unknown class",
        *(WSSS, "which data.classes lacks", option("--data.classes=[boat, car]")),
    ),
    Case("table of tags missing", WSSS, "are missing", option("--data.tags=no.csv")),
    Case("table without a header line", WSSS, "image,tags", table("a.jpg,boat\n")),
    Case(
        "duplicate photograph in the table",
        *(WSSS, "is listed twice", table(f"{ONE}{FIRST}.jpg,boat;car\n{FIRST}.jpg,car\n")),
    ),
    Case("too many cells in the table", WSSS, "quotes", table(f"{ONE}{FIRST}.jpg,boat,car\n")),
    Case("table is not UTF-8", WSSS, "UTF-8", table(b"image,tags\n\xff\xfe,boat\n")),
    Case(
        "photograph named in the table missing",
        *(WSSS, "gone.jpg is missing", table(f"{ONE}gone.jpg,boat\n")),
    ),
    Case(
        "unknown class in the table",
        *(WSSS, "which data.classes lacks", table(f"{ONE}{FIRST}.jpg,unicorn\n")),
    ),
    Case("no photograph has a tag", WSSS, "no image a tag", table(f"{ONE}{FIRST}.jpg,\n")),
    Case(
        "two photographs with one id",
        *(WSSS, "share a file", table(f"{ONE}{FIRST}.jpg,boat\n{FIRST}.png,boat\n")),
    ),
    Case(
        "results inside the folder of photographs",
        *(WSSS, "is inside data.root", lambda b: change(run_dir=str(b.photographs() / "run"))(b)),
    ),
    # Pseudo labels
    Case("label missing", DEBIAS, "1 of 16 label maps", label(lambda path: path.unlink())),
    Case("folder of labels missing", DEBIAS, "missing", option("--wsss.labels_dir=nowhere")),
    Case("label of the wrong size", DEBIAS, "size of its image", label(png(mode="P", size=(9, 9)))),
    Case(
        "label in colours",
        *(DEBIAS, "not colours", label(png(mode="RGB", size=(128, 128), color=(7, 70, 7)))),
    ),
    Case(
        "label that mixes VOC's colours with others",
        *(DEBIAS, "numbers and colours contradict", label(contradictory)),
    ),
    Case("label is a JPEG", DEBIAS, "is a JPEG picture, whatever its name", label(jpeg)),
    Case(
        "16-bit label",
        *(DEBIAS, "numbers end at 255", label(png(mode="I;16", size=(128, 128), color=999))),
    ),
    Case("label with transparency", DEBIAS, "transparent", label(png(mode="LA", size=(128, 128)))),
    Case(
        "label with an unknown number",
        *(DEBIAS, "holds label 77", label(png(mode="L", size=(128, 128), color=77))),
    ),
    Case("label truncated", DEBIAS, "cannot be read", label(broken)),
    Case("label of 0 bytes", DEBIAS, "cannot be read", label(lambda path: path.write_bytes(b""))),
    Case("labels already debiased", DEBIAS, "already debiased", labels_of(254)),
    Case("labels without background", DEBIAS, "no label map .* has background", objects_alone),
    Case("labels with only 0 and 255", DEBIAS, "hold only 0 and 255", labels_of(0, 255)),
    Case("labels without any class", DEBIAS, "holds any class: all 16", labels_of(0)),
    Case(
        "labels numbered in another order",
        *(DEBIAS, "data.classes in the order", label(renumbered)),
    ),
    Case(
        "labels of photographs that EXIF rotates",
        *(DEBIAS, "Width and height are swapped", lambda b: label(lying(b))(b)),
    ),
    # Features
    Case("features missing", DEBIAS, "feature files are missing", feature(lambda p: p.unlink())),
    Case(
        "features without channels",
        DEBIAS,
        "expected finite",
        feature(lambda p: np.save(p, np.ones((4, 4)))),
    ),
    Case(
        "integer features",
        DEBIAS,
        "expected finite",
        feature(lambda p: np.save(p, np.ones((4, 4, 4), int))),
    ),
    Case(
        "features not finite",
        DEBIAS,
        "expected finite",
        feature(lambda p: np.save(p, np.full((4, 4, 4), np.nan))),
    ),
    Case(
        "pickled features",
        DEBIAS,
        "cannot be read",
        feature(lambda p: np.save(p, np.array([{}], object))),
    ),
    Case("features truncated", DEBIAS, "cannot be read", feature(broken)),
    Case(
        "features with another number of channels",
        DEBIAS,
        "channels, not 4 like most",
        feature(lambda p: np.save(p, np.ones((5, 8, 8), np.float32))),
    ),
    Case(
        "features with channels last",
        *(DEBIAS, r"\(h, w, D\): save array.transpose", feature(reshaped(8, 8, 4))),
    ),
    Case("features as tokens", DEBIAS, "list of tokens", feature(reshaped(4, 64, 1))),
    Case("features are an archive", DEBIAS, "are an archive", feature(archived)),
    Case(
        "features without cells",
        DEBIAS,
        "expected finite",
        feature(lambda p: np.save(p, np.ones((4, 0, 8), np.float32))),
    ),
    # Scoring
    Case(
        "prediction missing",
        SCORE,
        "predictions are missing",
        lambda b: predictions(b, lambda f: (f / "val_00000.png").unlink()),
    ),
    Case(
        "prediction of the wrong size",
        SCORE,
        "size of its image",
        lambda b: predictions(b, lambda f: Image.new("L", (5, 5)).save(f / "val_00000.png")),
    ),
    Case(
        "prediction in colours",
        SCORE,
        "not colours",
        lambda b: predictions(
            b, lambda f: Image.new("RGB", (128, 128), "orange").save(f / "val_00000.png")
        ),
    ),
    Case(
        "prediction with an unknown class",
        SCORE,
        "holds label 99",
        lambda b: predictions(
            b, lambda f: Image.new("L", (128, 128), 99).save(f / "val_00000.png")
        ),
    ),
    Case(
        "ground truth with biased pixels",
        SCORE,
        "not ground truth",
        lambda b: (
            predictions(b),
            Image.new("L", (128, 128), 254).save(b.data / "SegmentationClass/val_00000.png"),
        ),
    ),
    Case(
        "empty folder of masks",
        SCORE,
        "no PNG masks",
        lambda b: (
            (b.folder / "none").mkdir(),
            b.options.extend(
                ["--masks", b.folder / "none", "--predictions", b.data, "--num_classes", 8]
            ),
        ),
    ),
    Case(
        "number of classes not given",
        SCORE,
        "num_classes",
        lambda b: b.options.extend(["--masks", b.data, "--predictions", b.data]),
    ),
    # Order, folders, machine
    Case("stage run too early: no labels", SEGMENT, "run make_debiased_labels", lambda b: None),
    Case(
        "stage run too early: no features",
        DEBIAS,
        "train this stage first|run train_uss",
        lambda b: b.folder_of_labels(),
    ),
    Case("stage run too early: no segmenter", SCORE, "train_segmentation", lambda b: None),
    Case("folder of another experiment", USS, "uss.flip: True there, False now", made_before),
    Case("manifest broken", USS, "not valid JSON", broken_manifest),
    Case("file where a folder belongs", USS, "run", in_the_way),
    Case(
        "folder that cannot be written",
        USS,
        r"(not permitted|denied|No such file|Read-only) .*\(/sys/",
        lambda b: b.settings.update(run_dir="/sys/mars"),
    ),
    Case("full disk", USS, "Nothing finished was lost", lambda b: None, {"RLIMIT_FSIZE": 2000}),
    Case(
        "training that diverges",
        SEGMENT,
        "the loss is not finite",
        lambda b: (
            b.folder_of_labels(),
            b.options.extend(
                [
                    "--segmentation.mode=wsss",
                    "--segmentation.lr=1e30",
                    "--segmentation.head_lr=1e30",
                    "--segmentation.optimizer=sgd",
                ]
            ),
        ),
    ),
    # Archives and annotations from elsewhere
    Case("archive missing", VOC, "missing", lambda b: archive(b, lambda path: None)),
    Case(
        "file that is not an archive",
        VOC,
        "damaged",
        lambda b: archive(b, lambda path: path.write_text("x" * 2000)),
    ),
    Case(
        "archive that writes outside its folder",
        VOC,
        "outside",
        lambda b: archive(b, climbing_archive),
    ),
    Case(
        "COCO annotations missing",
        COCO,
        "missing",
        lambda b: b.options.extend(["--root", b.folder]),
    ),
    Case("COCO annotations broken", COCO, "not valid JSON", lambda b: instances(b, '{"images": [')),
    Case(
        "COCO annotations in another format",
        COCO,
        "lacks",
        lambda b: instances(b, json.dumps({"images": []})),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.told)
def test_bad_input_is_refused_in_one_message(case, tiny_data, tmp_path):
    box = Box(tiny_data, tmp_path)
    case.spoil(box)
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    done = box.run(case.script, **(case.limits or {}))
    assert done.returncode not in (0, None), done.stdout
    said = [line for line in re.split(r"[\r\n]", done.stderr) if "it/s]" not in line]
    assert "Traceback" not in done.stderr, done.stderr
    assert sum(line.startswith("error: ") for line in said) == 1, done.stderr
    assert re.search(case.message, done.stderr), done.stderr
    new = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    assert not [p for p in new if p.name.endswith(".part")]


def test_document_lists_every_kind():
    text = (ROOT / "docs/reliability.md").read_text()
    listed = re.findall(r"^- (.*)$", text.split("## Bad input")[1].split("\n## ")[0], re.MULTILINE)
    assert listed == [case.told for case in CASES] and len({*listed}) >= 60


assert CLASSES  # the classes of the tiny data set, boat and car among them
