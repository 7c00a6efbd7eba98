"""Label maps and features against tags and photographs: what is a warning, and what stops."""

import re

import numpy as np
import pytest
from PIL import Image

from core.data.checks import check_features, check_inputs, check_labels, headers, judge, look_at
from core.data.labels import IGNORE, write_label
from core.data.lists import Split, ground_truth, read_split
from core.data.settings import DataConfig
from core.run.errors import UserError

CLASSES = ("boat", "car", "cat", "dog")


class World:
    """Photographs of a size, each with one tag in turn, and label maps that hold it."""

    def __init__(self, folder, count=20, size=(48, 64), orientation=1):
        self.folder, self.count = folder, count
        self.tags = np.arange(count)[:, None] % 4 == np.arange(4)
        self.images = [folder / f"photos/{k:02}.png" for k in range(count)]
        self.labels = [folder / f"labels/{k:02}.png" for k in range(count)]
        self.features = [folder / f"features/{k:02}.npy" for k in range(count)]
        (folder / "photos").mkdir()
        (folder / "features").mkdir()
        exif = Image.Exif()
        exif[0x0112] = orientation
        for k in range(count):
            Image.new("L", size[::-1]).save(self.images[k], exif=exif)
            self.write(k, self.map_of(1 + k % 4))

    def photographs(self):
        return headers(Split(tuple(map(str, self.images)), tuple(self.images), self.tags), 1)

    def map_of(self, *classes, shape=(48, 64)):
        label = np.zeros(shape, np.uint8)
        for place, c in enumerate(classes):
            label[10 * place : 10 * place + 9, 5:60] = c
        return label

    def write(self, k, label):
        write_label(self.labels[k], label)

    def found(self, kind="pseudo"):
        return check_labels(self.labels, self.photographs(), self.tags, CLASSES, 2, kind)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_sound_maps_are_neither_problem_nor_warning(world):
    for kind in ("pseudo", "debiased", "truth"):
        found = world.found(kind)
        assert not found.problems and not found.warnings


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((0, 255), "no label map .* holds any class: all 20 hold only 0 and 255.* instead of 255"),
        ((255, 255), "holds any class: all 20 hold only 255, which means 'ignored'"),
        ((0, 0), "holds any class: all 20 hold only 0, the background"),
        ((0, 254), "holds any class: all 20 hold 254, biased pixels"),
    ],
)
def test_maps_without_any_class_stop(world, values, told):
    for k in range(world.count):
        label = np.full((48, 64), values[0], np.uint8)
        label[5:20] = values[1]
        world.write(k, label)
    split = Split(tuple("abcdefghijklmnopqrst"), tuple(world.images), world.tags)
    with pytest.raises(UserError, match=told):
        check_inputs(split, world.labels, CLASSES, 1, "debiased")


def test_some_masks_of_255_alone_are_counted(world):
    for k in (3, 5):
        world.write(k, world.map_of(IGNORE))
    found = world.found("truth")
    assert not found.problems and len(found.warnings) == 1
    assert "2 of 20 masks" in found.warnings[0] and "03.png" in found.warnings[0]
    assert not world.found("pseudo").warnings  # pixels of which a method is unsure
    for k in range(10):
        world.write(k, world.map_of(IGNORE))
    assert "10 of 20 masks" in world.found("truth").problems[0]


def test_a_few_untagged_classes_are_a_warning(world):
    for k in (4, 8):  # boats
        world.write(k, world.map_of(1, 3))
    found = world.found()
    assert not found.problems and len(found.warnings) == 1
    assert "2 of 20 label maps" in found.warnings[0]
    assert "04.png (cat; tags: boat)" in found.warnings[0]


def test_maps_that_all_hold_some_untagged_class_next_to_their_own_are_a_warning(world):
    """Labels of a network that nobody told the tags, or tags that are not complete."""
    for k in range(world.count):
        world.write(k, world.map_of(1 + k % 4, 1 + (k + 1 + k // 4 % 3) % 4))
    found = world.found()
    assert not found.problems and "20 of 20 label maps" in found.warnings[0]


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ((2, 1, 3, 4), r"10 of 20 .* data.classes in the order \[car, boat, cat, dog\] would fit"),
        ((3, 1, 4, 2), r"20 of 20 .* in the order \[car, dog, boat, cat\] would fit"),
        ((0, 1, 2, 3), r"every number is one too low \(0 is background\)"),
        ((1, 1, 1, 1), "the numbers follow another order than data.classes"),
        ((4, 4, 4, 4), "the numbers follow another order than data.classes"),
    ],
)
def test_numbers_that_do_not_follow_the_classes_stop(world, numbers, told):
    for k in range(world.count):
        world.write(k, world.map_of(numbers[k % 4]))
    (problem,) = world.found().problems
    assert re.search(told, problem), problem


def test_swapped_pair_among_many_classes_stops(tmp_path):
    """Two rare classes are confused; four of five maps agree with their tags."""
    world = World(tmp_path, 40)
    world.tags[:] = False
    for k in range(world.count):
        c = k % 2 if k < 32 else 2 + k % 2
        world.tags[k, c] = True
        world.write(k, world.map_of(1 + c if c < 2 else 6 - c))
    (problem,) = world.found().problems
    assert "8 of 40 label maps" in problem and "[boat, car, dog, cat]" in problem


def test_photographs_without_tags_are_not_compared(world):
    world.tags[:] = False
    found = world.found()
    assert not found.problems and not found.warnings


def test_vocs_masks_agree_with_the_tags_of_their_photographs(voc_photos):
    data = DataConfig(root=str(voc_photos), tags="tags.csv", val_list="val_photos").with_classes()
    split = read_split(data, "val")
    paths = ground_truth(data, split)
    seen = [look_at(p, 20)[1:] for p in paths]
    found = judge(paths, seen, data.classes, "truth", split.tags)
    assert len(paths) >= 40 and not found.problems
    order = np.r_[3, 0:3, 4:20]
    found = judge(paths, seen, data.classes, "truth", split.tags[:, order])
    assert "data.classes in the order [bird, boat" not in found.problems[0]
    assert "would fit" in found.problems[0]


@pytest.mark.parametrize(
    ("orientation", "size", "shape", "problem", "warning"),
    [
        (6, (48, 64), (48, 64), "EXIF orientation", ""),
        (6, (48, 64), (64, 48), "", ""),
        (3, (48, 64), (48, 64), "", "4 photographs are mirrored or upside down without their EXIF"),
        (1, (48, 64), (48, 64), "", ""),
        (6, (48, 48), (48, 48), "", "4 photographs are mirrored or upside down without their EXIF"),
        (3, (48, 48), (48, 48), "", "4 photographs are mirrored or upside down without their EXIF"),
        (1, (48, 48), (48, 48), "", ""),
    ],
)
def test_maps_of_photographs_that_exif_turns(tmp_path, orientation, size, shape, problem, warning):
    world = World(tmp_path, 4, size, orientation)
    for k in range(world.count):
        world.write(k, world.map_of(1 + k, shape=shape))
    found = world.found()
    assert len(found.problems) == (4 if problem else 0) and len(found.warnings) == bool(warning)
    assert problem in "".join(found.problems) and warning in "".join(found.warnings)
    (tmp_path / "manifest.json").touch()  # then the labels are a stage's, which reads upright
    assert not world.found().warnings


@pytest.mark.parametrize(
    ("sizes", "shapes", "told"),
    [
        # (H, W) of photographs, shapes of the files -> what is said; None: nothing
        ([(480, 640)], [(384, 30, 40)], None),
        ([(480, 640), (640, 480)], [(384, 30, 40), (384, 40, 30)], None),
        ([(375, 500)], [(384, 47, 63)], None),  # patches of 8, rounded up
        ([(375, 500)], [(64, 48, 64)], None),  # padded to a multiple of 64
        ([(375, 500), (500, 333)], [(768, 28, 28)] * 2, None),  # resized to a square
        ([(480, 640), (640, 480)], [(768, 30, 40)] * 2, None),  # to one size
        ([(3, 300)], [(16, 1, 19)], None),
        ([(2, 200)], [(16, 1, 1)], None),
        ([(64, 80)], [(384, 1, 1)], "before it is pooled"),
        ([(64, 80)], [(8, 10, 24)], r"\(h, w, D\): save array.transpose\(2, 0, 1\)"),
        ([(375, 500), (500, 375)], [(28, 28, 384)] * 2, r"\(h, w, D\)"),
        ([(64, 64)], [(8, 8, 24)], r"\(h, w, D\)"),
        ([(64, 80)], [(24, 81, 1)], "tokens"),
        ([(480, 640), (640, 480)], [(1, 1201, 384)] * 2, "tokens"),
        ([(480, 640), (375, 500)], [(384, 40, 30), (384, 32, 24)], r"\(D, w, h\)"),
        ([(480, 640)], [(384, 40, 30)], r"\(D, w, h\)"),
    ],
)
def test_feature_grids_that_are_read_wrong_are_refused(tmp_path, sizes, shapes, told):
    images, paths = [], []
    for k, (size, shape) in enumerate(zip(sizes * 3, shapes * 3, strict=True)):
        images.append(tmp_path / f"{k}.png")
        paths.append(tmp_path / f"{k}.npy")
        Image.new("1", size[::-1]).save(images[k])
        np.save(paths[k], np.zeros(shape, np.float16))
    split = Split(tuple(map(str, images)), tuple(images), np.zeros((len(images), 1), bool))
    found = check_features(paths, headers(split, 1), 2)
    assert not found.warnings and len(found.problems) == bool(told)
    assert not told or re.search(told, found.problems[0]), found.problems


def test_a_few_odd_grids_are_counted(world):
    for k, path in enumerate(world.features):
        np.save(path, np.zeros((32, 6, 8) if k not in (3, 7) else (32, 3, 12), np.float32))
    found = check_features(world.features, world.photographs(), 1)
    assert not found.problems and len(found.warnings) == 1
    assert "2 of 20 feature files do not have the shape" in found.warnings[0]
    assert "03.npy" in found.warnings[0]


def test_features_of_photographs_before_exif_turned_them_are_refused(tmp_path):
    world = World(tmp_path, 20)
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("L", (64, 48)).save(world.images[5], exif=exif)
    for path in world.features:
        np.save(path, np.zeros((32, 6, 8), np.float32))
    np.save(world.features[9], np.zeros((32, 6, 7), np.float32))  # grids do not all have one size
    (problem,) = check_features(world.features, world.photographs(), 1).problems
    assert "1 of 20" in problem and "05.npy" in problem and "EXIF orientation" in problem


def test_features_of_another_width_are_named(world):
    for k, path in enumerate(world.features):
        np.save(path, np.zeros((32 + (k == 4), 6, 8), np.float32))
    (problem,) = check_features(world.features, world.photographs(), 1).problems
    assert "04.npy have 33 channels, not 32 like most" in problem
