import numpy as np
import pytest
import torch
from conftest import CLASSES

from core.config import BackboneConfig, DataConfig, UssConfig
from core.errors import UserError
from core.features import (
    SemanticFeatures,
    centred,
    feature_files,
    file_features,
    mean_feature,
    network_features,
)
from core.splits import read_split

RESNET = BackboneConfig("resnet18", {"channels": [8, 8, 16, 24]}, "none")


@pytest.fixture
def split(tiny_data):
    return read_split(DataConfig(root=str(tiny_data), classes=tuple(CLASSES)), "val")


def write_features(folder, split, array):
    for image_id in split.ids:
        np.save(folder / f"{image_id}.npy", array)


def test_files_are_read_in_any_float_type(split, tmp_path):
    write_features(tmp_path, split, np.ones((3, 2, 4), np.float16))
    (index, feat), *_ = file_features(feature_files(tmp_path, split))([2])
    assert index == 2 and feat.dtype == torch.float32 and feat.shape == (3, 2, 4)


@pytest.mark.parametrize(
    "array",
    [np.ones((3, 4)), np.ones((3, 2, 4), int), np.full((3, 2, 4), np.nan)],
    ids=["flat", "integers", "not finite"],
)
def test_files_of_another_form_are_refused(split, tmp_path, array):
    write_features(tmp_path, split, array)
    with pytest.raises(UserError, match="expected finite floats"):
        list(file_features(feature_files(tmp_path, split))([0]))


def test_pickled_and_missing_files_are_refused(split, tmp_path):
    with pytest.raises(UserError, match="6 of 6 feature files are missing"):
        feature_files(tmp_path, split)
    for image_id in split.ids:
        np.save(tmp_path / f"{image_id}.npy", np.array([{}], object))
    with pytest.raises(UserError, match="cannot be read"):
        list(file_features(feature_files(tmp_path, split))([0]))


def test_centred_features_have_mean_zero(split, tmp_path):
    rng = np.random.default_rng(0)
    for image_id in split.ids:
        np.save(tmp_path / f"{image_id}.npy", rng.normal(3, 1, (4, 2, 2)).astype(np.float32))
    source = file_features(feature_files(tmp_path, split))
    moved = centred(source, mean_feature(source, len(split)))
    assert mean_feature(moved, len(split)).abs().max() < 1e-6


def test_batched_features_equal_those_of_single_images(split):
    network = SemanticFeatures(UssConfig(backbone=RESNET, method="frozen", stage=3)).eval()
    plain = torch.autocast("cpu", enabled=False)
    source = network_features(network, split, torch.device("cpu"), plain)
    together = dict(source(range(6)))
    alone = dict(source([4]))
    assert together[4].shape == (16, 16, 16)
    assert torch.allclose(together[4], alone[4], atol=1e-5)


def test_flip_makes_features_of_a_mirrored_image_the_mirrored_features(split):
    network = SemanticFeatures(UssConfig(backbone=RESNET, method="frozen", stage=3)).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(network(images.flip(-1)), network(images).flip(-1), atol=1e-5)
        assert network(torch.rand(1, 3, 60, 33)).shape == (1, 16, 8, 5)  # up to the next multiple
