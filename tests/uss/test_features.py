import numpy as np
import pytest
import torch
from conftest import CLASSES, run_python

from core.config import make_parser, parse
from core.data.features import feature_files, feature_shape, file_features, read_features
from core.data.lists import read_split
from core.data.settings import DataConfig
from core.models.backbones import BackboneConfig
from core.models.feature_networks import ViT, feature_network
from core.pipeline import feature_source
from core.run.errors import UserError
from core.run.vision import timm
from core.uss.features import (
    SemanticFeatures,
    UssConfig,
    network_features,
    standardised_source,
    statistics,
)

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


def saved_as(kind: str, file) -> None:
    array = np.ones((3, 2, 4), np.float32)
    if kind == "archive":
        np.savez_compressed(file, features=array)
    elif kind == "checkpoint":
        torch.save(torch.from_numpy(array), file)
    elif kind == "objects":
        np.lib.format.write_array(file, np.array([{"features": 1}]))
    else:
        file.write({"text": b"0.1,0.2\n", "half a file": b"\x93NUMPY\x01\0v\0", "none": b""}[kind])


@pytest.mark.parametrize(
    "kind", ["archive", "checkpoint", "objects", "text", "half a file", "none"]
)
@pytest.mark.parametrize("read", [read_features, feature_shape])
def test_other_files_under_the_name_of_an_array_are_one_message(tmp_path, kind, read):
    with (tmp_path / "x.npy").open("wb") as file:
        saved_as(kind, file)
    told = (
        "x.npy are an archive.*" if kind in ("archive", "checkpoint") else "x.npy cannot be read.*"
    )
    with pytest.raises(UserError, match=told + r"expected finite floats \(D, h, w\)"):
        read(tmp_path / "x.npy")


def test_shape_is_that_of_the_array(tmp_path):
    np.save(tmp_path / "x.npy", np.asfortranarray(np.ones((3, 2, 4), np.float16)))
    assert feature_shape(tmp_path / "x.npy") == read_features(tmp_path / "x.npy").shape == (3, 2, 4)


def test_centred_features_have_mean_zero(split, tmp_path):
    rng = np.random.default_rng(0)
    for image_id in split.ids:
        np.save(tmp_path / f"{image_id}.npy", rng.normal(3, 1, (4, 2, 2)).astype(np.float32))
    source = file_features(feature_files(tmp_path, split))
    moved = standardised_source(source, len(split), None)
    assert statistics(moved, len(split))[0].abs().max() < 1e-6


def test_whitened_features_are_uncorrelated_principal_components(split, tmp_path):
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(6, 6))
    for image_id in split.ids:
        feat = np.einsum("kd,dhw->khw", mix, rng.normal(3, 1, (6, 5, 4)))
        np.save(tmp_path / f"{image_id}.npy", feat.astype(np.float32))
    source = file_features(feature_files(tmp_path, split))
    points = np.concatenate([f.flatten(1).numpy() for _, f in source(range(len(split)))], 1)
    variances = np.linalg.eigvalsh(np.cov(points))[::-1]  # images of one size count alike
    whitened = standardised_source(source, len(split), 4)
    white = np.concatenate([f.flatten(1).numpy() for _, f in whitened(range(len(split)))], 1)
    assert np.allclose(np.cov(white), np.eye(4), atol=0.01)
    rebuilt = np.linalg.lstsq(white.T, points.T - points.mean(1), rcond=None)
    assert np.isclose(rebuilt[1].sum() / points.shape[1], variances[4:].sum(), rtol=0.02)
    with pytest.raises(UserError, match="7 components of features with 6 channels"):
        standardised_source(source, len(split), 7)


def test_whitening_of_fewer_cells_than_channels_is_finite(tmp_path):
    feat = torch.rand(8, 1, 2)
    source = lambda indices: ((k, feat) for k in indices)  # noqa: E731
    ((_, white),) = standardised_source(source, 1, 8)([0])
    assert white.isfinite().all() and white[0].std() > 0.5


def test_stages_are_joined_on_the_grid_of_the_first_one_named():
    images, maps = torch.rand(1, 3, 64, 96), {}
    for stages in (2, 3, [3, 2], [2, 3]):
        torch.manual_seed(0)
        network = feature_network(BackboneConfig(name="efficientnet_lite0", weights="none"), stages)
        with torch.no_grad():
            maps[str(stages)] = network.eval()(images)
    assert maps["2"].shape == (1, 40, 8, 12) and maps["3"].shape == (1, 112, 4, 6)
    assert maps["[3, 2]"].shape == (1, 152, 4, 6) and maps["[2, 3]"].shape == (1, 152, 8, 12)
    with pytest.raises(UserError, match="backbone_stage needs at least one stage"):
        UssConfig(backbone_stage=())
    unit = torch.nn.functional.normalize(maps["3"], dim=1)
    assert torch.allclose(maps["[3, 2]"][:, 40:], unit, atol=1e-5)


def test_batched_features_equal_those_of_single_images(split):
    network = SemanticFeatures(UssConfig(backbone=RESNET, method="frozen", backbone_stage=3)).eval()
    plain = torch.autocast("cpu", enabled=False)
    source = network_features(network, split, torch.device("cpu"), plain)
    together = dict(source(range(6)))
    alone = dict(source([4]))
    assert together[4].shape == (16, 16, 16)
    assert torch.allclose(together[4], alone[4], atol=1e-5)


def test_flip_makes_features_of_a_mirrored_image_the_mirrored_features(split):
    network = SemanticFeatures(UssConfig(backbone=RESNET, method="frozen", backbone_stage=3)).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(network(images.flip(-1)), network(images).flip(-1), atol=1e-5)
        assert network(torch.rand(1, 3, 60, 33)).shape == (1, 16, 8, 5)  # up to the next multiple


def test_further_scales_are_averaged_on_the_grid_of_the_first():
    images, maps = torch.rand(1, 3, 64, 48), []
    for scales in ((1.0,), (0.5,), (1.0, 0.5)):
        torch.manual_seed(0)
        config = UssConfig(backbone=RESNET, method="frozen", backbone_stage=3, scales=scales)
        with torch.no_grad():
            maps.append(SemanticFeatures(config).eval()(images))
    assert maps[0].shape == maps[2].shape == (1, 16, 8, 6) and maps[1].shape == (1, 16, 4, 3)
    half = torch.nn.functional.interpolate(maps[1], (8, 6), mode="bilinear")
    assert torch.allclose(maps[2], (maps[0] + half) / 2, atol=1e-6)


def test_cached_features_are_those_of_the_network(experiment):
    found, plain = [], torch.autocast("cpu", enabled=False)
    for cache in ("false", "true"):
        options = [f"--run_dir={experiment.parent / cache}", f"--uss.cache={cache}"]
        options = ["--config", str(experiment), *options, "--uss.method=frozen"]
        done = run_python("train_uss.py", *options)
        assert done.returncode == 0, done.stderr
        config, _ = parse(make_parser("", ""), options)
        split = read_split(config.data, "train")
        found.append(dict(feature_source(config, split, torch.device("cpu"), plain)([3, 9])))
    files = sorted((experiment.parent / "true/uss/features").glob("*.npy"))
    assert len(files) == len(split) and np.load(files[0]).dtype == np.float16
    assert not (experiment.parent / "false/uss/features").exists()
    for index in (3, 9):
        assert torch.allclose(found[0][index], found[1][index], atol=4e-3)
    files[0].unlink()
    with pytest.raises(UserError, match="1 of 16 feature files are missing.*run train_uss"):
        feature_source(config, split, torch.device("cpu"), plain)


VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}


def vit() -> ViT:
    return ViT(BackboneConfig("vit_tiny_patch16_224", VIT, "none")).eval()


def test_positions_at_the_training_size_are_those_of_the_network_itself():
    network, images = vit(), torch.rand(2, 3, 64, 64)
    fixed = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT).eval()
    fixed.load_state_dict(network.net.state_dict())
    with torch.no_grad():
        tokens = fixed.forward_features(images)[:, 1:]
        assert torch.equal(network(images), tokens.transpose(1, 2).unflatten(2, (4, 4)))


def test_a_shifted_image_gives_shifted_features_at_another_size():
    network, images = vit(), torch.rand(1, 3, 96, 160)
    torch.nn.init.zeros_(network.net.pos_embed)  # then nothing but the layout tells the places
    with torch.no_grad():
        feat = network(images)
        moved = network(images.roll((16, 48), (2, 3)))
    assert feat.shape == (1, 32, 6, 10)
    assert torch.allclose(moved, feat.roll((1, 3), (2, 3)), atol=1e-5)
    assert not torch.allclose(moved, feat, atol=1e-2)


def test_positions_are_interpolated_to_another_size():
    network, images = vit(), torch.zeros(1, 3, 128, 64)
    ramp = torch.linspace(0, 1, 4)[:, None, None].expand(4, 4, 32)  # grows from top to bottom
    with torch.no_grad():
        network.net.pos_embed[:, 1:] = ramp.reshape(1, 16, 32)
        network.net.patch_embed.proj.bias.zero_()
        added = network.net._pos_embed(network.net.patch_embed(images))[0, 1:].view(8, 4, 32)
    assert torch.allclose(added, added[:, :1, :1].expand_as(added), atol=1e-6)
    assert (added[1:] > added[:-1]).all() and added.min() < 0.05 and added.max() > 0.95
