"""Network files: what they contain, and that they predict as the checkpoint does."""

import contextlib
import io
import json
import os
import zipfile
from functools import partial

import cv2
import numpy as np
import pytest
import torch
from conftest import CLASSES, run_inside

from core.data.labels import read_label
from core.models.backbones import BackboneConfig
from core.models.deeplab import build_deeplab
from core.run import checkpoint, vision
from core.run.errors import UserError
from core.segmenter import SegmentationConfig
from tools.exchange import networks
from tools.exchange.networks import Deployed, read_network, save_network

RESNET = BackboneConfig("resnet18", {"channels": [8, 8, 16, 16]}, "none")
SETTINGS = {"aspp_dim": 8, "low_dim": 8, "rates": [2, 4]}


def network(head: str = "deeplabv3plus"):
    torch.manual_seed(0)
    settings = SegmentationConfig(network=head, backbone=RESNET, **SETTINGS)
    built = build_deeplab(settings, len(CLASSES)).eval()
    *_, last = (m for m in built.modules() if isinstance(m, torch.nn.Conv2d))
    with torch.no_grad():  # random networks see one class everywhere
        last.weight *= 30
        last.bias.zero_()
    return built


def exported(suffix: str, folder, head: str = "deeplabv3plus"):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    path = folder / f"net{suffix}"
    assert save_network(network(head), CLASSES, 64, path) < 1e-4
    return path


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_file_predicts_photographs_as_the_checkpoint_does(suffix, tmp_path):
    made_from = {"classes": CLASSES, "stage": "stage 4", "inputs": {}}
    made_from["settings"] = {
        "segmentation.backbone.name": "resnet18",
        "segmentation.backbone.arguments": RESNET.arguments,
        **{f"segmentation.{key}": value for key, value in SETTINGS.items()},
    }
    state = {"ema": network().state_dict(), "made_from": made_from}
    checkpoint.save(tmp_path / "checkpoint.pth", state)
    path = exported(suffix, tmp_path)
    (tmp_path / "photographs").mkdir()
    rng = np.random.default_rng(0)
    for k, size in enumerate([(64, 80), (71, 53)]):
        picture = cv2.resize(rng.integers(0, 255, (6, 6, 3), np.uint8), size)
        cv2.imwrite(str(tmp_path / f"photographs/{k}.png"), picture)
    settings = ("--precision=fp32", "--evaluation.scales=[1.0]", "--workers=0")
    settings += ("--evaluation.refine=none", "--images", tmp_path / "photographs")
    for name, source in (
        ("theirs", ("--weights", tmp_path / "checkpoint.pth")),
        ("ours", ("--network", path)),
    ):
        done = run_inside("tools/predict.py", *source, *settings, "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
    for k in range(2):
        ours, theirs = (read_label(tmp_path / n / f"labels/{k}.png") for n in ("ours", "theirs"))
        assert (ours == theirs).mean() >= 0.999
    assert len(np.unique(theirs)) > 1
    signed = json.loads((tmp_path / "ours/labels/made_from.json").read_text())
    assert signed["classes"] == CLASSES


@pytest.mark.parametrize("head", ["deeplabv1", "deeplabv2"])
def test_other_heads_are_exported(head, tmp_path):
    run, classes = read_network(exported(".pt2", tmp_path, head))
    images = torch.rand(2, 3, 61, 75) * 255
    with torch.inference_mode():
        expected = Deployed(network(head)).eval()(images)
        assert classes == tuple(CLASSES) and torch.allclose(run(images), expected, atol=1e-5)
    assert expected.shape == (2, 9, 61, 75) and torch.allclose(expected.sum(1), torch.ones(()))


@pytest.mark.parametrize("length", [11, 12, 13])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 2), (3, 1, 2)])
def test_convolutions_that_keep_sizes_are_the_same(length, kernel, stride, dilation):
    module = vision.timm.layers.Conv2dSame(2, 2, kernel, stride=stride, dilation=dilation)
    images = torch.rand(1, 2, length, 14)
    assert torch.equal(networks._padded_convolution(module, images), module(images))


def test_sizes_in_an_archive_do_not_nest():
    """Sizes written with remainders grow from layer to layer and take minutes to read."""
    layers = [vision.timm.layers.Conv2dSame(3, 3, 3, stride=2) for _ in range(4)]
    stem = torch.nn.Sequential(*layers)
    expected = [stem(torch.ones(1, 3, h, w)) for h, w in ((64, 64), (61, 75), (47, 90))]
    for module in layers:
        module.forward = partial(networks._padded_convolution, module)
    auto = torch.export.Dim.AUTO
    example = torch.rand(networks.EXAMPLE)
    program = torch.export.export(stem, (example,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    values = [node.meta.get("val") for node in program.graph.nodes]
    sizes = [str(side) for v in values if isinstance(v, torch.Tensor) for side in v.shape]
    assert max(map(len, sizes)) < 50
    for (h, w), value in zip(((64, 64), (61, 75), (47, 90)), expected, strict=True):
        assert torch.equal(program.module()(torch.ones(1, 3, h, w)), value)


def test_wrong_files_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"the suffix must be one of \.pt2, \.onnx"):
        save_network(network(), CLASSES, 64, tmp_path / "net.pth")
    with pytest.raises(UserError, match="is missing; correct --network"):
        read_network(tmp_path / "none.onnx")
    for suffix in (".pt2", ".onnx"):
        path = tmp_path / f"broken{suffix}"
        path.write_bytes(b"nothing")
        with pytest.raises(UserError, match=f"broken{suffix} is not a file of|needs the package"):
            read_network(path)
    arguments = ("--images", tmp_path, "--output", tmp_path.with_name("elsewhere"))
    both = ("--weights", "a.pth", "--network", "b.onnx")
    done = run_inside("tools/predict.py", *both, *arguments)
    assert done.returncode == 1 and "either --weights or --network" in done.stderr
    done = run_inside("tools/predict.py", "--weights", tmp_path / "none.pth", *arguments)
    assert done.returncode == 1 and "none.pth is missing; correct --weights" in done.stderr


class Hostile:
    """Unpickled, it would make a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return type(self.mark).touch, (self.mark,)


def test_hostile_archive_is_refused_and_not_run(tmp_path):
    path, mark = exported(".pt2", tmp_path), tmp_path / "ran"
    payload = io.BytesIO()
    torch.save(Hostile(mark), payload)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (inputs,) = [name for name in parts if "sample_inputs" in name and name.endswith(".pt")]
    parts[inputs] = payload.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="net.pt2 is not a file of"):
        read_network(path)
    assert not mark.exists() and networks.ONLY_WEIGHTS not in os.environ
    # Unsafe on purpose: shows that the archive, made above, runs what it carries without the guard.
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert mark.exists()


def test_missing_package_is_named_with_the_command(monkeypatch, tmp_path):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(networks.importlib, "import_module", missing)
    (tmp_path / "net.onnx").write_bytes(b"")
    with pytest.raises(UserError, match="onnxruntime: pip install -r requirements-onnx.txt"):
        read_network(tmp_path / "net.onnx")
