import numpy as np
import pytest
from conftest import sample
from PIL import Image

from core.errors import UserError
from core.labels import (
    BIASED,
    IGNORE,
    palette,
    read_label,
    read_truth,
    to_disk,
    to_training,
    write_label,
)


@pytest.mark.parametrize(
    ("label", "colour"),
    [
        (0, (0, 0, 0)),
        (1, (128, 0, 0)),
        (2, (0, 128, 0)),
        (15, (192, 128, 128)),
        (255, (224, 224, 192)),
    ],
)
def test_palette_is_that_of_voc(label, colour):
    assert tuple(palette()[label]) == colour


def test_label_map_survives_the_disk_and_has_a_palette(tmp_path):
    label = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write_label(tmp_path / "a" / "x.png", label)
    assert np.array_equal(read_label(tmp_path / "a" / "x.png"), label)
    with Image.open(tmp_path / "a" / "x.png") as image:
        assert image.mode == "P" and image.getpalette()[3:6] == [128, 0, 0]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.png"]


def test_biased_is_minus_one_in_tensors_and_254_on_disk():
    disk = np.array([[0, 3, 254, 255]], np.uint8)
    assert to_training(disk).tolist() == [[0, 3, BIASED, 255]]
    assert np.array_equal(to_disk(to_training(disk)), disk)


def test_value_beyond_the_classes_is_refused(tmp_path):
    write_label(tmp_path / "x.png", np.full((2, 2), 9, np.uint8))
    with pytest.raises(UserError, match="x.png holds label 9"):
        read_label(tmp_path / "x.png", num_classes=8)


def test_wrong_size_is_refused(tmp_path):
    write_label(tmp_path / "x.png", np.zeros((2, 3), np.uint8))
    with pytest.raises(UserError, match="3x2 pixels"):
        read_label(tmp_path / "x.png", size=(3, 2))


def test_truncated_file_is_refused(tmp_path):
    label = np.random.default_rng(0).integers(0, 9, (64, 64), np.uint8)
    write_label(tmp_path / "x.png", label)
    data = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="truncated"):
        read_label(tmp_path / "x.png")


def test_colour_picture_is_not_a_label_map(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="mode RGB"):
        read_label(tmp_path / "x.png")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.png is missing"):
        read_label(tmp_path / "gone.png")


def test_float_label_is_a_programming_error(tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        write_label(tmp_path / "x.png", np.zeros((2, 2)))


def test_real_masks_survive_the_palette_with_every_value(tmp_path):
    paths = sorted(sample("voc_masks").glob("*.png"))
    values = set()
    for path in paths:
        label = read_label(path, 20)
        write_label(tmp_path / path.name, label)
        again = read_label(tmp_path / path.name, 20, label.shape)
        assert again.dtype == label.dtype == np.uint8 and again.tobytes() == label.tobytes()
        with Image.open(path) as original, Image.open(tmp_path / path.name) as written:
            assert np.array_equal(original.convert("RGB"), written.convert("RGB"))
        values |= set(np.unique(label).tolist())
    assert len(paths) > 90 and values == {*range(21), IGNORE}


def test_ground_truth_holds_no_biased_pixels(tmp_path):
    write_label(tmp_path / "x.png", np.array([[0, 3, 255]], np.uint8))
    assert read_truth(tmp_path / "x.png", 3).tolist() == [[0, 3, 255]]
    write_label(tmp_path / "x.png", np.array([[0, 3, 254]], np.uint8))
    with pytest.raises(UserError, match="x.png holds 254, biased pixels; it is no ground truth"):
        read_truth(tmp_path / "x.png", 3)
