"""tools/data/check_data.py: every planted defect is found in one call."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import run_inside, tiny_config
from PIL import Image

from core.data.labels import read_label, write_label
from core.data.lists import Split
from tools.data import check_data

NAMES = ("boat", "train", "traffic light")
IMAGES = [f"{'ab'[k % 2]}/{k:02}.{('jpg', 'png', 'webp')[k % 3]}" for k in range(36)]


def stem(k: int) -> str:
    return str(Path(IMAGES[k]).with_suffix(""))


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder data set of 36 images without defects, with masks, labels and features."""
    root, rng = tmp_path / "data", np.random.default_rng(0)
    lines = ["image,tags"]
    for k, name in enumerate(IMAGES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shape = (20 + k % 3, 24)
        Image.fromarray(rng.integers(0, 255, (*shape, 3)).astype(np.uint8)).save(root / name)
        label = (rng.integers(0, 2, shape) * (1, 3, 2)[k % 3]).astype(np.uint8)
        label[0] = 255
        write_label(root / "masks" / f"{stem(k)}.png", label)
        write_label(tmp_path / "labels" / f"{stem(k)}.png", label)
        features = tmp_path / "features" / f"{stem(k)}.npy"
        features.parent.mkdir(parents=True, exist_ok=True)
        np.save(features, rng.normal(size=(5, 3, 4)).astype(np.float32))
        lines.append(f"{name},{NAMES[k % 3]}" + (";boat;train" if k % 7 == 0 else ""))
    (root / "tags.csv").write_text("\n".join(lines) + "\n")
    (root / "val.txt").write_text("\n".join(map(stem, range(20, 36))) + "\n")
    return root


def check(root: Path, **settings):
    folder = root.parent
    config = tiny_config(root, folder / "run") | {"workers": 2}
    lists = {"tags": "tags.csv", "masks": "masks", "val_list": "val"}
    config["data"] = {"format": "folder", "root": str(root), **lists, **settings}
    config["wsss"]["labels_dir"] = str(folder / "labels")
    config["uss"]["features_dir"] = str(folder / "features")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    before = sorted(folder.rglob("*"))
    done = run_inside("tools/data/check_data.py", "--config", folder / "config.yaml")
    assert "Traceback" not in done.stderr and sorted(folder.rglob("*")) == before
    return done


def test_data_without_defects_passes(data):
    done = check(data)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[1:] == ["0 problems, 0 warnings"]


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def edit(path: Path, before: str, after: str) -> None:
    content = path.read_text()
    assert before in content
    path.write_text(content.replace(before, after))


def plant(root: Path) -> dict[str, str]:
    """Plants defects; returns what has to stand on one line of the output: place -> reason."""
    tags, masks = root / "tags.csv", root / "masks"
    labels, features = root.parent / "labels", root.parent / "features"
    (root / IMAGES[0]).unlink()
    cut(root / IMAGES[3])
    cut(root / IMAGES[1])
    cut(root / IMAGES[2], 0.7)
    (root / IMAGES[4]).write_text("<html>not found</html>")
    (root / IMAGES[5]).write_bytes(b"")
    floats = Image.fromarray(np.zeros((21, 24), np.float32))
    floats.save(root / IMAGES[7], "TIFF")  # complete, but OpenCV reads no such pixels
    edit(tags, f"{IMAGES[6]},", f"{IMAGES[6]},bota;")
    edit(tags, f"{IMAGES[8]},traffic light\n", f"{IMAGES[8]},boat,train\n")
    with tags.open("a") as file:
        file.write(f"{IMAGES[9]},boat\n../outside.jpg,boat\n/etc/passwd.png,boat\n")
        file.write(f"{stem(10)}.jpeg,train\nb\\odd.jpg,train\n")
    (root.parent / "outside.jpg").write_bytes((root / IMAGES[12]).read_bytes())
    (root / f"{stem(10)}.jpeg").write_bytes((root / IMAGES[12]).read_bytes())
    with (root / "val.txt").open("a") as file:
        file.write(f"{stem(21)}\nb/99\n")
    (masks / f"{stem(22)}.png").unlink()
    cut(masks / f"{stem(23)}.png")
    write_label(masks / f"{stem(24)}.png", np.zeros((24, 20), np.uint8))
    write_label(masks / f"{stem(25)}.png", np.full((21, 24), 4, np.uint8))
    Image.new("RGB", (24, 22), (9, 9, 9)).save(masks / f"{stem(26)}.png")
    write_label(masks / f"{stem(27)}.png", np.full((20, 24), 254, np.uint8))
    (labels / f"{stem(12)}.png").unlink()
    write_label(labels / f"{stem(13)}.png", np.zeros((20, 24), np.uint8))
    (features / f"{stem(14)}.npy").unlink()
    np.save(features / f"{stem(15)}.npy", np.full((5, 3, 4), np.nan, np.float32))
    np.save(features / f"{stem(16)}.npy", np.zeros((6, 3, 4), np.float32))
    # Only writes: a file that holds a pickle is one of the defects to be found.
    with (features / f"{stem(17)}.npy").open("wb") as file:
        np.lib.format.write_array(file, np.array([{}]))
    return {
        **{IMAGES[0]: "is missing", IMAGES[3]: "cannot be decoded", IMAGES[1]: "cannot be decoded"},
        **{IMAGES[k]: "cannot be decoded" for k in (2, 4, 5, 7)},
        "tags.csv names": "class 'bota'",
        "tags.csv, line 10": "put tags that hold commas in quotes",
        IMAGES[9]: "is listed twice",
        "'../outside'": "not a plain path",
        "'/etc/passwd'": "not a plain path",
        r"'b\\odd'": "not a plain path",
        f"{stem(10)}.jpeg": "would share a file of results",
        f"id {stem(21)}": "twice in the list",
        "b/99 of": "has no tags",
        f"masks/{stem(22)}.png": "is missing",
        f"masks/{stem(23)}.png": "cannot be read",
        f"masks/{stem(24)}.png": "20x24 pixels",
        f"masks/{stem(25)}.png": "holds label 4",
        f"masks/{stem(26)}.png": "Save class numbers, not colours",
        f"masks/{stem(27)}.png": "not ground truth",
        f"labels/{stem(12)}.png": "is missing",
        f"labels/{stem(13)}.png": "a label map has the size of its image",
        f"features/{stem(14)}.npy": "cannot be read",
        f"features/{stem(15)}.npy": "not finite",
        f"features/{stem(16)}.npy": "another width than 5",
        f"features/{stem(17)}.npy": "pickle",
    }


def test_all_planted_defects_are_found_in_one_call(data):
    planted = plant(data)
    done = check(data, classes=sorted(NAMES))
    lines = [line for line in done.stdout.splitlines() if line.startswith("problem: ")]
    assert done.returncode == 1, done.stdout + done.stderr
    for place, reason in planted.items():
        assert any(place in line and reason in line for line in lines), (place, reason, lines)
    assert done.stdout.splitlines()[-1].startswith(f"{len(lines)} problems")
    surplus = [n for n in lines if not any(p in n and r in n for p, r in planted.items())]
    assert len(planted) >= 20 and not surplus


def test_defects_of_the_table_do_not_hide_others_where_classes_are_derived(data):
    with (data / "tags.csv").open("a") as file:
        file.write(f"{IMAGES[9]},boat\n")
    (data / IMAGES[0]).unlink()
    done = check(data)
    assert done.returncode == 1 and "2 problems" in done.stdout
    assert IMAGES[0] in done.stdout and f"{IMAGES[9]} is listed twice" in done.stdout


def test_defects_of_a_voc_data_set_are_found_in_both_lists(tiny_data, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    (root / "JPEGImages/val_00001.jpg").unlink()
    (root / "Annotations/train_00002.xml").write_text("<annotation>")
    cut(root / "JPEGImages/train_00003.jpg")
    (root / "SegmentationClass/train_00004.png").write_bytes(b"")
    (root / "SegmentationClass/train_00005.png").unlink()  # needed for no list but val
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config(root, tmp_path / "run")))
    done = run_inside("tools/data/check_data.py", "--config", path)
    assert done.returncode == 1 and "4 problems" in done.stdout, done.stdout
    for name in ("val_00001.jpg", "train_00002.xml", "train_00003.jpg", "train_00004.png"):
        assert name in done.stdout


def test_what_is_wrong_throughout_is_told_once(data):
    """Numbers in another order, features channels last; and photographs that EXIF turns."""
    folder, exif = data.parent, Image.Exif()
    for path in (folder / "labels").rglob("*.png"):
        write_label(path, np.array([0, 2, 3, 1] + [255] * 252, np.uint8)[read_label(path)])
    for path in (folder / "features").rglob("*.npy"):
        np.save(path, np.ones((3, 4, 30), np.float32))
    exif[0x0112] = 3
    for name in IMAGES[:3]:
        Image.open(data / name).save(data / name, exif=exif)
    done = check(data)
    assert done.returncode == 1 and "2 problems, 2 warnings" in done.stdout, done.stdout
    order = "data.classes in the order [train, boat, traffic light] would fit"
    for told in (order, "save array.transpose(2, 0, 1)", "3 photographs are mirrored or upside"):
        assert told in done.stdout


@pytest.mark.parametrize("missing", ["tags.csv", "val.txt"])
def test_missing_table_or_list_is_told(data, missing):
    (data / missing).unlink()
    done = check(data, classes=sorted(NAMES))
    assert done.returncode == 1 and missing in done.stdout


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["boat", "train", "traffic light", "boat train"] * 4, []),
        (
            ["boat train", "boat traffic light"] * 4,
            [
                "100% of the training images show boat",
                "train never occurs without boat",
                "traffic light never occurs without boat",
            ],
        ),
        (
            ["boat train", "traffic light", "train"] * 4,
            ["boat never occurs without train"],
        ),
        (["boat", "train"] * 4, ["no training image shows traffic light"]),
        (
            ["boat", "train", "traffic light", ""] * 4,
            ["4 training images have no tag"],
        ),
    ],
)
def test_tags_that_debiasing_learns_little_from_are_warned_of(tags, expected):
    rows = np.array([[name in image for name in NAMES] for image in tags])
    paths = tuple(map(Path, IMAGES[: len(rows)]))
    warnings = check_data.doubtful_tags(Split(tuple(map(str, paths)), paths, rows), NAMES)
    assert len(warnings) == len(expected)
    assert all(w.startswith(e) for w, e in zip(warnings, expected, strict=True))


def test_warnings_alone_leave_the_status_at_zero(data):
    lines = [f"{name},{'boat;train' if k % 2 else 'boat'}" for k, name in enumerate(IMAGES)]
    for path in (data.parent / "labels").rglob("*.png"):
        write_label(path, np.minimum(read_label(path), 1))
    (data / "tags.csv").write_text("\n".join(["image,tags", *lines]) + "\n")
    done = check(data, masks=None, classes=sorted(NAMES))
    assert done.returncode == 0, done.stdout + done.stderr
    for warning in ("show boat", "train never occurs without boat", "data.masks is not set"):
        assert warning in done.stdout
    assert "0 problems, 4 warnings" in done.stdout
