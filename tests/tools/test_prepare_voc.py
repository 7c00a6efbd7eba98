"""tools/data/prepare_voc.py on small archives in the official structure, and on the real lists."""

import io
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import run_inside, sample
from PIL import Image
from scipy.io import savemat

from core.data.labels import palette, read_label
from core.data.lists import ground_truth, read_split
from core.data.settings import VOC_CLASSES, DataConfig
from core.data.tags import read_table
from tools.data import prepare_voc

BASE, SBD_BASE = "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset"
TRAIN, VAL, SBD_ONLY = ["2007_01", "2007_02"], ["2008_01", "2008_02"], ["2009_01", "2009_02"]
NAMES = dict(
    zip([*TRAIN, *VAL, *SBD_ONLY], ("dog", "cat", "bus", "dog", "train", "sofa"), strict=True)
)


def photograph(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


def mask(label: int) -> np.ndarray:
    mask = np.zeros((12, 16), np.uint8)
    mask[3:9, 4:12] = label
    return mask


def indexed(label: np.ndarray) -> bytes:
    image = Image.fromarray(label)
    image.putpalette(palette().tobytes())
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def annotation(name: str) -> bytes:
    part = "<part><name>head</name></part>"
    return f"<annotation><object><name>{name}</name>{part}</object></annotation>".encode()


def matlab(label: np.ndarray) -> bytes:
    """A file of SBD: a struct with the mask and its boundaries."""
    content = {"Segmentation": label, "Boundaries": np.zeros((20, 1)), "CategoriesPresent": [1]}
    savemat(file := io.BytesIO(), {"GTcls": content}, do_compression=True)
    return file.getvalue()


@pytest.fixture
def voc() -> dict[str, bytes]:
    """Members of VOCtrainval, all photographs included."""
    files = {f"{BASE}/Annotations/README.txt": b"", f"{BASE}/ImageSets/Main/dog_train.txt": b"x"}
    for k, (image_id, name) in enumerate(NAMES.items()):
        files[f"{BASE}/JPEGImages/{image_id}.jpg"] = photograph(k)
        files[f"{BASE}/Annotations/{image_id}.xml"] = annotation(name)
        if image_id in (*TRAIN, *VAL):
            label = mask(VOC_CLASSES.index(name) + 1)
            label[0] = 255
            files[f"{BASE}/SegmentationClass/{image_id}.png"] = indexed(label)
    for name, ids in {"train": TRAIN, "val": VAL}.items():
        files[f"{BASE}/ImageSets/Segmentation/{name}.txt"] = "\n".join(ids).encode()
    return files


@pytest.fixture
def sbd() -> dict[str, bytes]:
    """Members of benchmark.tgz; its lists share images with both of VOC's."""
    ids = {"train": [TRAIN[0], SBD_ONLY[0], VAL[0]], "val": [SBD_ONLY[1], VAL[1]]}
    files = {f"{SBD_BASE}/{k}.txt": "\n".join(v).encode() for k, v in ids.items()}
    for image_id in sum(ids.values(), []):
        label = mask(VOC_CLASSES.index(NAMES[image_id]) + 1)
        files[f"{SBD_BASE}/cls/{image_id}.mat"] = matlab(label)
    return files | {f"{SBD_BASE}/img/{SBD_ONLY[0]}.jpg": b"another copy"}


def pack(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def spread(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def prepare(folder: Path, *arguments, subset: bool = True):
    options = ("--output", folder / "out", *(("--subset",) if subset else ()))
    done = run_inside("tools/data/prepare_voc.py", *arguments, *options)
    assert "Traceback" not in done.stderr
    return done


def refusal(folder: Path, *arguments) -> str:
    done = prepare(folder, *arguments)
    assert done.returncode == 1 and not (folder / "out/tags.csv").exists()
    return done.stderr


@pytest.mark.parametrize("suffix", [".tar", ".tgz", ".zip"])
def test_archives_become_a_data_set(tmp_path, voc, sbd, suffix):
    archives = ("--voc", pack(tmp_path / f"voc{suffix}", voc))
    archives += ("--sbd", pack(tmp_path / f"benchmark{suffix}", sbd), "--sbd-masks")
    done = prepare(tmp_path, *archives)
    assert done.returncode == 0, done.stderr
    names = {"train_list": "train_aug", "tags": "tags.csv", "masks": "SegmentationClassAug"}
    data = DataConfig(root=str(tmp_path / "out"), **names).with_classes()
    train, val = read_split(data, "train"), read_split(data, "val")
    assert train.ids == (*TRAIN, *SBD_ONLY) and val.ids == tuple(VAL)
    for split in (train, val):
        for k, path in enumerate(ground_truth(data, split)):
            label = 1 + VOC_CLASSES.index(NAMES[split.ids[k]])
            assert split.tags[k].nonzero()[0].tolist() == [label - 1]
            found = read_label(path, 20, split.read_image(k).shape[:2])
            own = split.ids[k] not in SBD_ONLY
            assert np.array_equal(found[1:], mask(label)[1:]) and (found[0] == 255).all() == own
    assert (
        not (tmp_path / "out/ImageSets/Main").exists() and not (tmp_path / "out/SBD/img").exists()
    )


@pytest.mark.parametrize("below", ["", "VOCdevkit", BASE])
def test_unpacked_copies_do_as_well(tmp_path, voc, sbd, below):
    root = spread(tmp_path / "copy", voc)
    done = prepare(tmp_path, "--voc", root / below, "--sbd", spread(tmp_path / "sbd", sbd))
    assert done.returncode == 0, done.stderr
    listed = (root / BASE / "ImageSets/Segmentation/train_aug.txt").read_text().split()
    assert listed == [*TRAIN, *SBD_ONLY] and not (tmp_path / "out").exists()


def test_second_call_writes_no_photograph_again(tmp_path, voc, sbd):
    archives = ("--voc", pack(tmp_path / "v.tar", voc), "--sbd", pack(tmp_path / "s.tgz", sbd))
    assert prepare(tmp_path, *archives, "--sbd-masks").returncode == 0
    lists = {"tags.csv", "train_aug.txt"}
    files = [p for p in (tmp_path / "out").rglob("*.*") if p.name not in lists]
    before = {p: p.stat().st_mtime_ns for p in files}
    content = {name: next((tmp_path / "out").rglob(name)).read_bytes() for name in lists}
    assert prepare(tmp_path, *archives, "--sbd-masks").returncode == 0
    assert before == {p: p.stat().st_mtime_ns for p in files}
    assert all(next((tmp_path / "out").rglob(n)).read_bytes() == c for n, c in content.items())


def test_part_of_the_data_is_refused_with_its_counts(tmp_path, voc, sbd):
    archives = ("--voc", pack(tmp_path / "v.tar", voc), "--sbd", pack(tmp_path / "s.tgz", sbd))
    done = prepare(tmp_path, *archives, subset=False)
    assert done.returncode == 1 and not (tmp_path / "out/tags.csv").exists()
    for line in ("train: 2 instead of 1,464", "val: 2 instead of 1,449", "--subset"):
        assert line in done.stderr
    assert "train_aug: 4 instead of 10,582" in done.stderr


def test_without_sbd_it_says_what_is_possible(tmp_path, voc):
    done = prepare(tmp_path, "--voc", pack(tmp_path / "v.tar", voc))
    assert done.returncode == 0, done.stderr
    assert "Without SBD there is no train_aug (10,582 images)" in done.stdout
    assert "all stages on train (2 images): --data.train_list train" in done.stdout
    assert not list(tmp_path.rglob("train_aug.txt"))
    assert [*read_table(tmp_path / "out/tags.csv")] == [*TRAIN, *VAL]


def test_test_list_joins_the_others(tmp_path, voc):
    files = {f"{BASE}/ImageSets/Segmentation/test.txt": b"2010_01\n"}
    files[f"{BASE}/JPEGImages/2010_01.jpg"] = photograph(9)
    archives = ("--voc", pack(tmp_path / "v.tar", voc), "--test", pack(tmp_path / "t.tar", files))
    done = prepare(tmp_path, *archives)
    assert done.returncode == 0, done.stderr
    data = DataConfig(root=str(tmp_path / "out"), val_list="test")
    assert read_split(data, "val", tagged=False).ids == ("2010_01",)


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("ImageSets/Segmentation/val.txt", None, "val.txt is missing"),
        ("JPEGImages/2007_02.jpg", None, "train: JPEGImages/2007_02.jpg is missing"),
        ("JPEGImages/2009_01.jpg", None, "train_aug: JPEGImages/2009_01.jpg is missing"),
        ("SegmentationClass/2008_01.png", None, "val: SegmentationClass/2008_01.png is missing"),
        ("Annotations/2009_02.xml", None, "2009_02.xml cannot be read"),
        ("Annotations/2007_01.xml", b"<annotation><obj", "2007_01.xml cannot be read"),
        ("Annotations/2007_01.xml", annotation("unicorn"), "2007_01.xml names class 'unicorn'"),
        ("Annotations/2007_01.xml", b"<annotation/>", "2007_01.xml names no class"),
        ("ImageSets/Segmentation/val.txt", b"2007_01\n", "2007_01 is on both lists"),
    ],
)
def test_defect_of_voc_is_named(tmp_path, voc, sbd, member, content, message):
    name = f"{BASE}/{member}"
    voc = {k: v for k, v in voc.items() if k != name} | ({} if content is None else {name: content})
    archives = ("--voc", pack(tmp_path / "v.tar", voc), "--sbd", pack(tmp_path / "s.tgz", sbd))
    assert message in refusal(tmp_path, *archives)


def test_all_defects_are_told_together(tmp_path, voc):
    del voc[f"{BASE}/JPEGImages/2007_02.jpg"], voc[f"{BASE}/SegmentationClass/2008_01.png"]
    voc[f"{BASE}/Annotations/2007_01.xml"] = b""
    message = refusal(tmp_path, "--voc", pack(tmp_path / "v.tar", voc))
    for part in ("3 problems", "2007_02.jpg", "2008_01.png", "2007_01.xml"):
        assert part in message


@pytest.mark.parametrize("suffix", [".tar", ".tgz", ".zip"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten", "empty"])
def test_damaged_archive_is_refused_and_leaves_no_part_of_a_file(tmp_path, voc, suffix, damage):
    path = pack(tmp_path / f"voc{suffix}", voc)
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    if damage == "truncated":
        data = data[: half - 100]
    elif damage == "empty":
        data = b""
    else:
        data[half - 600 : half + 600] = b"\x5a" * 1200
    path.write_bytes(data)
    assert f"voc{suffix} is damaged" in refusal(tmp_path, "--voc", path)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
@pytest.mark.parametrize(
    "name",
    [
        f"{BASE}/JPEGImages/../../../../escaped.jpg",
        f"/{BASE}/JPEGImages/escaped.jpg",
        f"../{BASE}/JPEGImages/escaped.jpg",
        f"{BASE}/JPEGImages/..\\..\\escaped.jpg",
        f"C:/{BASE}/JPEGImages/escaped.jpg",
    ],
)
def test_member_that_would_lie_outside_is_refused(tmp_path, voc, name, suffix):
    path = pack(tmp_path / f"voc{suffix}", {**voc, name: b"x"})
    assert "would be written outside its folder" in refusal(tmp_path, "--voc", path)
    assert not list(tmp_path.rglob("*escaped*"))


def test_link_in_an_archive_is_not_followed(tmp_path, voc):
    (tmp_path / "secret").write_text("secret")
    name = f"{BASE}/JPEGImages/2007_01.jpg"
    del voc[name]
    path = pack(tmp_path / "v.tar", voc)
    with tarfile.open(path, "a") as archive:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        archive.addfile(entry)
    assert "JPEGImages/2007_01.jpg is missing" in refusal(tmp_path, "--voc", path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "2009_01.mat is missing"),
        (b"", "2009_01.mat is not a mask of SBD"),
        (b"not from Matlab" * 40, "2009_01.mat is not a mask of SBD"),
        (matlab(mask(12))[:-60], "2009_01.mat is not a mask of SBD"),
        (matlab(mask(12))[:200] + b"\x5a" * 80, "2009_01.mat is not a mask of SBD"),
        (matlab(mask(21)), "2009_01.mat is not a mask of SBD (expected labels 0..20)"),
        (
            matlab(np.full((4, 4), 300.0)),
            "2009_01.mat is not a mask of SBD (expected labels 0..20)",
        ),
    ],
    ids=["missing", "empty", "text", "truncated", "overwritten", "label 21", "label 300"],
)
def test_defect_of_sbd_is_named_each_time(tmp_path, voc, sbd, content, message):
    name = f"{SBD_BASE}/cls/{SBD_ONLY[0]}.mat"
    sbd = {k: v for k, v in sbd.items() if k != name} | ({} if content is None else {name: content})
    archives = ("--voc", pack(tmp_path / "v.tar", voc), "--sbd", pack(tmp_path / "s.tgz", sbd))
    for _ in range(2):
        done = prepare(tmp_path, *archives, "--sbd-masks")
        assert done.returncode == 1 and message in done.stderr
    assert not (tmp_path / f"out/SegmentationClassAug/{SBD_ONLY[0]}.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--voc", "gone.tar"), "gone.tar is missing"),
        (("--voc", "other.tar"), "is not the archive of VOC 2012"),
        (("--voc", "empty"), "has no JPEGImages"),
        (("--voc", "voc.tar", "--sbd", "voc.tar"), "is not SBD's archive"),
        (("--voc", "voc.tar", "--sbd", "empty"), "has no folder cls"),
        (("--voc", "voc.tar", "--test", "copy"), "--test is a folder"),
    ],
)
def test_wrong_source_is_told(tmp_path, voc, arguments, message):
    pack(tmp_path / "voc.tar", voc)
    pack(tmp_path / "other.tar", {"README": b"x"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "copy/JPEGImages").mkdir(parents=True)
    places = [a if a.startswith("--") else tmp_path / a for a in arguments]
    assert message in refusal(tmp_path, *places)


def test_masks_of_sbd_need_sbd(tmp_path):
    done = prepare(tmp_path, "--voc", tmp_path, "--sbd-masks")
    assert done.returncode == 2 and "--sbd-masks needs --sbd" in done.stderr


def check_train_aug(folder: Path, train: list[str], val: list[str], train_aug: list[str]) -> None:
    """Lists like SBD's, which share images with both of VOC's, give `train_aug`."""
    ids = sorted({*train_aug} - {*train}) + train[::3] + val[::2]
    np.random.default_rng(0).shuffle(ids)
    (folder / "train.txt").write_text("\n".join(ids[: 3 * len(ids) // 4]))
    (folder / "val.txt").write_text("\n".join(ids[3 * len(ids) // 4 :]))
    assert prepare_voc.derive_train_aug(folder, train, val) == train_aug


def test_train_aug_is_sbd_and_train_without_val(tmp_path):
    ids = [f"20{k % 5 + 7:02}_{k:06}" for k in range(1000)]
    check_train_aug(tmp_path, ids[:100], ids[100:200], sorted(ids[:100] + ids[200:]))


def test_known_counts_are_those_of_the_real_lists(tmp_path):
    folder = sample("voc_lists")
    lists = {n: (folder / f"{n}.txt").read_text().split() for n in prepare_voc.LISTS}
    assert {n: len(ids) for n, ids in lists.items()} == prepare_voc.LISTS
    check_train_aug(tmp_path, lists["train"], lists["val"], lists["train_aug"])
    table = read_table(folder / "image_tags.csv", VOC_CLASSES)
    assert len(table) == len(lists["train_aug"]) + len(lists["val"])
    counts = Counter(name for i in lists["train_aug"] for name in table[i])
    assert tuple(counts[c] for c in VOC_CLASSES) == prepare_voc.TAGGED
