"""tools/data/prepare_coco.py on whole data sets; both rules of overlap on hand-made cases."""

import json
import os
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import run_inside
from PIL import Image

from core.data.labels import read_label
from core.data.lists import ground_truth, read_split
from core.data.settings import DataConfig
from core.data.tags import read_table
from core.run.errors import UserError
from tools.data.coco_annotations import draw_mask, group, region

SPLITS = ("train2014", "val2014")


def prepare(root: Path, *arguments, subset: bool = True):
    options = ("--root", root, "--workers", 1, *(("--subset",) if subset else ()))
    done = run_inside("tools/data/prepare_coco.py", *options, *arguments)
    assert "Traceback" not in done.stderr
    return done


def write_split(root: Path, split: str, content: dict) -> None:
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def prepared(coco_sample, tmp_path_factory) -> Path:
    """Five eighths of the photographs to train on, the rest to score."""
    root, pictures = tmp_path_factory.mktemp("coco"), coco_sample / "images"
    content = json.loads((coco_sample / "annotations" / "instances.json").read_text())
    images = content["images"]
    cut = len(images) * 5 // 8
    for split, part in zip(SPLITS, (images[:cut], images[cut:]), strict=True):
        ids = {image["id"] for image in part}
        annotations = [a for a in content["annotations"] if a["image_id"] in ids]
        write_split(root, split, {**content, "images": part, "annotations": annotations})
        (root / split).mkdir()
        for image in part:
            (root / split / image["file_name"]).symlink_to(pictures / image["file_name"])
    done = prepare(root)
    assert done.returncode == 0, done.stderr
    assert "prepared" in done.stdout and f"{len(images) - cut} to score" in done.stdout
    return root


def instances(root: Path):
    """Every image of both splits with its annotations and each one's label."""
    for split in SPLITS:
        content = json.loads((root / f"annotations/instances_{split}.json").read_text())
        ids = sorted(c["id"] for c in content["categories"])
        annotations = defaultdict(list)
        for a in content["annotations"]:
            annotations[a["image_id"]].append((1 + ids.index(a["category_id"]), a))
        for image in content["images"]:
            yield split, image, annotations[image["id"]]


def inside(segmentation: dict | list, height: int, width: int) -> np.ndarray:
    """(H, W) bool: pixels of runs, or whose centres one of the polygons encloses."""
    if isinstance(segmentation, list):
        return np.any([enclosed(polygon, height, width) for polygon in segmentation], 0)
    counts = segmentation["counts"]
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def enclosed(polygon: list[float], height: int, width: int) -> np.ndarray:
    """(H, W) bool: pixels whose centres a polygon encloses, by counting crossings on each row."""
    x, y = np.reshape(polygon, (-1, 2)).T
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    centre = np.arange(height)[:, None] + 0.5
    row, edge = np.nonzero((y <= centre) != (next_y <= centre))
    along = (centre[row, 0] - y[edge]) / (next_y - y)[edge]
    crossing = x[edge] + along * (next_x - x)[edge]
    flips = np.zeros((height, width + 1), int)
    np.add.at(flips, (row, np.clip(np.ceil(crossing - 0.5), 0, width).astype(int)), 1)
    return flips.cumsum(1)[:, :width] % 2 == 1


def test_masks_equal_an_independent_rasterisation(prepared):
    shared, union = np.zeros(81), np.zeros(81)
    for split, image, annotations in instances(prepared):
        expected = np.zeros((image["height"], image["width"]), np.uint8)
        for label, a in sorted(annotations, key=lambda p: (not p[1]["iscrowd"], -p[1]["area"])):
            expected[inside(a["segmentation"], *expected.shape)] = label
        stem = Path(image["file_name"]).stem
        found = read_label(prepared / f"masks/{split}/{stem}.png", 80, expected.shape)
        assert (found == expected).mean() > 0.998, stem
        for label in np.union1d(found, expected):
            shared[label] += ((found == label) & (expected == label)).sum()
            union[label] += ((found == label) | (expected == label)).sum()
    # COCO moves corners to fifths of a pixel, which shows at borders alone; the lowest value is
    # that of a class of a few hundred pixels.
    iou = shared[union > 0] / union[union > 0]
    assert len(iou) > 40 and iou.min() > 0.965
    assert shared[union > 2000].sum() / union[union > 2000].sum() > 0.999


def test_tags_are_the_categories_of_the_annotations(prepared):
    names = (prepared / "classes.txt").read_text().splitlines()
    table = read_table(prepared / "tags.csv", names)
    categories = json.loads((prepared / f"annotations/instances_{SPLITS[0]}.json").read_text())
    ordered = sorted(categories["categories"], key=lambda c: c["id"])
    assert len(names) == 80 and names == [c["name"] for c in ordered]
    expected = {
        f"{split}/{image['file_name']}": {names[label - 1] for label, _ in annotations}
        for split, image, annotations in instances(prepared)
    }
    assert {name: set(tags) for name, tags in table.items()} == expected


def test_data_set_is_read_by_the_pipeline(prepared):
    names = tuple((prepared / "classes.txt").read_text().splitlines())
    lists = {"train_list": "train", "val_list": "val", "tags": "tags.csv", "masks": "masks"}
    data = DataConfig("folder", str(prepared), classes=names, **lists)
    train, val = read_split(data, "train"), read_split(data, "val")
    assert len(val) >= 9 and train.tags.any(1).all()
    for split in (train, val):
        for k, path in enumerate(ground_truth(data, split)):
            found = set(np.unique(read_label(path, 80, split.read_image(k).shape[:2])))
            assert found - {0} <= set(1 + split.tags[k].nonzero()[0])


def test_images_without_annotation_are_not_trained_on(prepared):
    listed = [i for n in ("train", "val") for i in (prepared / f"{n}.txt").read_text().split()]
    bare = [(s, i["file_name"]) for s, i, annotations in instances(prepared) if not annotations]
    assert bare
    for split, name in bare:
        assert not read_label(prepared / f"masks/{split}/{Path(name).stem}.png").any()
        assert (f"{split}/{name}" in listed) == (split == "val2014")


CATEGORIES = [
    {"id": 7, "name": "train"},
    {"id": 90, "name": "toothbrush"},
    {"id": 1, "name": "man"},
]
SQUARE = {"category_id": 1, "segmentation": [[1, 1, 7, 1, 7, 7, 1, 7]], "area": 36}
BAR = {"category_id": 7, "segmentation": [[0, 3, 8, 3, 8, 5, 0, 5]], "area": 16}
CROWD = {  # columns 6 and 7 of an 8 x 8 image; runs go down the columns
    "category_id": 90,
    "segmentation": {"size": [8, 8], "counts": [48, 16]},
    "area": 16,
    "iscrowd": 1,
}
TWO_PARTS = {  # a line and a point are no area
    "category_id": 90,
    "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2], [6, 6, 8, 6, 8, 8, 6, 8], [0, 4, 8, 4], [3, 3]],
    "area": 8,
}


def expected_mask(*painted: tuple[int, slice, slice]) -> np.ndarray:
    mask = np.zeros((8, 8), np.uint8)
    for label, rows, columns in painted:
        mask[rows, columns] = label
    return mask


SQUARE_AREA = (1, slice(1, 7), slice(1, 7))  # labels are 1, 2, 3 for categories 1, 7, 90
BAR_AREA = (2, slice(3, 5), slice(0, 8))
CROWD_AREA = (3, slice(0, 8), slice(6, 8))


@pytest.fixture
def made(tmp_path) -> Path:
    """Images of 8 x 8 pixels with the annotations above; `bare` has none."""
    (tmp_path / "val2014").mkdir()
    content = {"bar_first": [BAR, SQUARE, CROWD], "parts": [TWO_PARTS], "bare": []}
    images, annotations = [], []
    (tmp_path / "train2014").mkdir()
    for k, (name, items) in enumerate(content.items(), 5):
        Image.new("RGB", (8, 8)).save(tmp_path / "train2014" / f"{name}.jpg")
        images.append({"id": k, "file_name": f"{name}.jpg", "height": 8, "width": 8})
        annotations += [{"iscrowd": 0, **a, "image_id": k, "id": 10 * k} for a in items]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    write_split(tmp_path, "train2014", content)
    shutil.copy(tmp_path / "train2014/bare.jpg", tmp_path / "val2014/scored.jpg")
    scored = {"id": 1, "file_name": "scored.jpg", "height": 8, "width": 8}
    write_split(tmp_path, "val2014", {**content, "images": [scored], "annotations": []})
    return tmp_path


@pytest.mark.parametrize(
    ("rule", "painted"),
    [
        ("smaller", [CROWD_AREA, SQUARE_AREA, BAR_AREA]),
        ("file-order", [BAR_AREA, SQUARE_AREA]),
    ],
)
def test_overlap_follows_the_rule(made, rule, painted):
    done = prepare(made, "--overlap", rule)
    assert done.returncode == 0, done.stderr
    mask = read_label(made / "masks/train2014/bar_first.png")
    assert np.array_equal(mask, expected_mask(*painted))
    parts = read_label(made / "masks/train2014/parts.png")
    assert np.array_equal(
        parts, expected_mask((3, slice(0, 2), slice(0, 2)), (3, slice(6, 8), slice(6, 8)))
    )
    assert not read_label(made / "masks/train2014/bare.png", size=(8, 8)).any()
    assert (made / "classes.txt").read_text().split() == ["man", "train", "toothbrush"]
    assert (made / "train.txt").read_text().split() == [
        "train2014/bar_first.jpg",
        "train2014/parts.jpg",
    ]
    assert (made / "val.txt").read_text().split() == ["val2014/scored.jpg"]
    table = read_table(made / "tags.csv")
    assert table["train2014/bar_first.jpg"] == ["man", "train", "toothbrush"]
    record = json.loads((made / "prepared.json").read_text())
    counts = {"train2014": [3, 2], "val2014": [1, 0]}
    assert record == {"overlap": rule, "images_and_tagged": counts}


def test_runs_as_text_and_as_numbers_are_the_same_area():
    from pycocotools import mask as coco_mask

    packed = coco_mask.frPyObjects(CROWD["segmentation"], 8, 8)
    text = {"size": packed["size"], "counts": packed["counts"].decode()}
    for runs in (CROWD["segmentation"], packed, text):
        item = {**CROWD, "segmentation": runs, "label": 3}
        found = draw_mask(8, 8, [item], "smaller")
        assert np.array_equal(found, expected_mask(CROWD_AREA))


def test_continuing_writes_only_what_is_missing(made):
    assert prepare(made).returncode == 0
    masks = sorted(made.glob("masks/*/*.png"))
    content = [path.read_bytes() for path in masks]
    for path in masks:
        os.utime(path, (1, 1))
    masks[0].unlink()
    assert prepare(made).returncode == 0
    assert [path.read_bytes() for path in masks] == content
    assert [path.stat().st_mtime == 1 for path in masks] == [False, True, True, True]


def test_masks_of_another_rule_are_refused(made):
    assert prepare(made).returncode == 0
    before = (made / "prepared.json").read_bytes()
    done = prepare(made, "--overlap", "file-order")
    assert done.returncode == 1 and "were made with --overlap smaller" in done.stderr
    assert (made / "prepared.json").read_bytes() == before


def test_missing_photograph_is_named(made):
    (made / "train2014/parts.jpg").unlink()
    done = prepare(made)
    assert done.returncode == 1 and "train2014/parts.jpg is missing" in done.stderr
    assert not (made / "prepared.json").exists() and not (made / "masks").exists()


def test_part_of_the_data_is_refused_with_its_counts(made):
    done = prepare(made, subset=False)
    assert done.returncode == 1 and "train2014 is not complete" in done.stderr
    assert "known: 82,783" in done.stdout and not (made / "masks").exists()


def damage(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": CATEGORIES[:2]}, "unknown image or category"),
        ({"images": []}, "unknown image or category"),
        (
            {"images": [{"id": 1, "file_name": "../x.jpg", "height": 8, "width": 8}]},
            "../x.jpg is not a plain file name",
        ),
    ],
)
def test_defect_of_the_instances_is_told(made, changes, message):
    damage(made / "annotations/instances_train2014.json", **changes)
    done = prepare(made)
    assert done.returncode == 1 and message in done.stderr


BAD = {
    "null": None,
    "nothing": [],
    "words": [["1", "1", "7", "1", "7", "7"]],
    "a box": [[1, 1, 7, 7]],
    "an odd number": [[1, 1, 7, 1, 7, 7, 1]],
    "points in space": [[[1, 1, 0], [7, 1, 0], [7, 7, 0]]],
    "shares": [[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]],
    "elsewhere": [[9, 9, 12, 9, 12, 12]],
    "far away": [[1, 1, 1e9, 1, 7, 7]],
    "not a number": [[1, 1, float("nan"), 1, 7, 7]],
    "no counts": {"size": [8, 8]},
    "no size": {"counts": [48, 16]},
    "another size": {"size": [16, 4], "counts": [48, 16]},
    "too short": {"size": [8, 8], "counts": [48, 8]},
    "negative": {"size": [8, 8], "counts": [48, -8, 24]},
    "background": {"size": [8, 8], "counts": [64]},
    "damaged text": {"size": [8, 8], "counts": "garbage!!"},
    "cut text": {"size": [8, 8], "counts": "0X"},
}


def with_segmentation(made: Path, segmentation: object, **changes) -> None:
    path = made / "annotations/instances_train2014.json"
    content = json.loads(path.read_text())
    content["annotations"][1] |= {"id": 77, "segmentation": segmentation, **changes}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("segmentation", BAD.values(), ids=BAD)
def test_annotation_without_a_usable_region_is_told(segmentation):
    with pytest.raises(ValueError, match="it|a point of its polygon"):
        region(segmentation, 8, 8)


@pytest.mark.parametrize(
    "changes", [{"area": None}, {"area": "9"}, {"image_id": [5]}, {"category_id": {}}], ids=str
)
def test_values_of_other_kinds_are_told(made, changes):
    content = json.loads((made / "annotations/instances_train2014.json").read_text())
    content["annotations"][1] |= changes
    with pytest.raises(UserError, match="annotation 50 of train2014, image"):
        group(content, "train2014")


@pytest.mark.parametrize(
    "segmentation",
    [
        [1, 1, 7, 1, 7, 7, 1, 7],
        [[1, 1], [7, 1], [7, 7], [1, 7]],
        [[[1, 1], [7, 1], [7, 7], [1, 7]]],
    ],
    ids=["numbers", "points", "polygons of points"],
)
def test_polygons_of_other_tools_are_read(segmentation):
    item = {**SQUARE, "iscrowd": 0, "segmentation": segmentation, "label": 1}
    found = draw_mask(8, 8, [item], "smaller")
    assert np.array_equal(found, expected_mask(SQUARE_AREA))


def test_bad_annotation_stops_or_is_left_out_of_mask_and_tags(made):
    with_segmentation(made, None)
    done = prepare(made)
    assert done.returncode == 1 and not (made / "masks").exists()
    assert (
        "annotation 77 of train2014, image bar_first.jpg: its segmentation is None" in done.stderr
    )
    assert "--on-bad-annotation skip" in done.stderr
    done = prepare(made, "--on-bad-annotation", "skip")
    assert done.returncode == 0, done.stderr
    assert "train2014: 1 annotation" in done.stdout and "annotation 77" in done.stdout
    mask = made / "masks/train2014/bar_first.png"
    assert np.array_equal(read_label(mask), expected_mask(CROWD_AREA, BAR_AREA))
    assert read_table(made / "tags.csv")["train2014/bar_first.jpg"] == ["train", "toothbrush"]

    with_segmentation(made, SQUARE["segmentation"])  # mended: the mask is drawn again
    assert prepare(made).returncode == 0
    assert np.array_equal(read_label(mask), expected_mask(CROWD_AREA, SQUARE_AREA, BAR_AREA))
    assert "annotations_left_out" not in json.loads((made / "prepared.json").read_text())


def test_file_without_any_usable_annotation_is_refused(made):
    path = made / "annotations/instances_train2014.json"
    content = json.loads(path.read_text())
    damage(path, annotations=[{**a, "segmentation": []} for a in content["annotations"]])
    done = prepare(made, "--on-bad-annotation", "skip")
    assert done.returncode == 1 and "4 problems" in done.stderr


def test_run_lengths_as_text_are_those_of_cocos_own_reader():
    from pycocotools import mask as coco_mask

    generator = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.98):
        mask = np.asfortranarray(generator.random((37, 51)) < share, np.uint8)
        packed = coco_mask.encode(mask)
        text = {"size": packed["size"], "counts": packed["counts"].decode()}
        item = {"segmentation": text, "label": 1, "iscrowd": 1, "area": 1}
        assert np.array_equal(draw_mask(37, 51, [item], "smaller"), mask)


def test_splits_with_different_categories_are_refused(made):
    damage(made / "annotations/instances_val2014.json", categories=CATEGORIES[:2])
    done = prepare(made)
    assert done.returncode == 1 and "name different categories" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not valid JSON"), ("{}", "it lacks images"), (None, "is missing; unpack COCO's")],
)
def test_broken_instance_file_is_told(made, content, message):
    path = made / "annotations/instances_val2014.json"
    path.unlink() if content is None else path.write_text(content)
    done = prepare(made)
    assert done.returncode == 1 and message in done.stderr


def test_mistyped_root_is_not_made(tmp_path):
    done = prepare(tmp_path / "nowhere")
    assert done.returncode == 1 and "set --root" in done.stderr
    assert not (tmp_path / "nowhere").exists()
