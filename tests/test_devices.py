"""The networks' mathematics keeps to the device of its inputs.

A tensor that was made on the CPU on the way would fail on a GPU alone, of which a test machine may
have none. PyTorch's meta device has shapes without values: it, too, refuses to be mixed.
"""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch.fx.experimental import _config

from core.complement import Complement, ComplementConfig, segmentation_loss
from core.crf.pamr import PAMR
from core.inference import multi_scale
from core.models.backbones import BackboneConfig
from core.models.deeplab import build_deeplab
from core.models.feature_networks import feature_network
from core.run.loop import EMA
from core.segmenter import SegmentationConfig
from core.uss.features import SemanticFeatures, UssConfig
from core.uss.self_supervision import (
    PrototypeNetwork,
    SelfSupervisedConfig,
    self_supervised_losses,
)
from core.uss.stego import stego_losses
from core.wsss.affinity import affinity_loss
from core.wsss.settings import METHODS, PAIR_NETWORKS, WsssConfig

META = torch.device("meta")
RESNET = BackboneConfig("resnet18", {"channels": [8, 8, 16, 16]}, "none", "none")
VIT = BackboneConfig(
    "vit_tiny_patch16_224",
    {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "none",
)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """The device has no autocast, and masks select everything where there are no values."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with _config.patch(meta_nonzero_assume_all_nonzero=True):
        yield


IMAGES = torch.randn(4, 3, 64, 64, device=META)
TAGS = torch.ones(4, 3, device=META)


@pytest.mark.parametrize("head", ["deeplabv1", "deeplabv2", "deeplabv3plus"])
@pytest.mark.parametrize("refine", ["none", "pamr"])
def test_step_of_stage_4(head, refine):
    settings = SegmentationConfig(
        network=head, backbone=RESNET, aspp_dim=8, low_dim=8, rates=(2, 4)
    )
    network = build_deeplab(settings, 3).to(META).train()
    complement = Complement(ComplementConfig(refine=refine, fill_prior=0.1), network, 1, META)
    label = torch.zeros(4, 64, 64, dtype=torch.int64, device=META)
    target, certainty, figures = complement.submit(IMAGES, label, TAGS)()
    logits = network.training_logits(IMAGES)
    loss = segmentation_loss(logits, target, certainty, True, at_cells=network.head.at_cells)
    loss.backward()
    assert {x.device for x in (loss, *figures.values())} == {META}
    probs = multi_scale(lambda x: network(x).softmax(1), IMAGES, (0.5, 1.0))
    assert probs.device == META and probs.shape == (4, 4, 64, 64)


@pytest.mark.parametrize("method", ["cam", "seam"])
def test_loss_and_maps_of_a_classifier(method):
    config = WsssConfig(method=method, output_stride=8)
    network = METHODS[method].network(config, RESNET, 3).to(META).train()
    loss = network.loss(IMAGES, TAGS)
    loss.backward()
    assert loss.device == META and network.activation(IMAGES).device == META


def test_losses_of_self_teaching():
    config = WsssConfig(method="rsepm", output_stride=8, epochs=20)
    network = METHODS["rsepm"].network(config, RESNET, 3).to(META).train()
    teacher = EMA(network, 0.9).network
    losses = METHODS["rsepm"].teacher(config.rsepm, network, teacher, 1)
    inside = torch.ones(4, 64, 64, dtype=torch.bool, device=META)
    figures = losses(IMAGES, TAGS, inside, round(config.rsepm.mix_from) - 1)  # without pasting
    figures["loss"].backward()
    assert {value.device for value in figures.values()} == {META}


@pytest.mark.parametrize("kind", PAIR_NETWORKS)
def test_loss_of_pairs(kind):
    config = replace(getattr(WsssConfig(), kind), radius=3)
    network = PAIR_NETWORKS[kind](RESNET, config).to(META).train()
    predictions = network(IMAGES).float()
    label = torch.zeros(4, *predictions.shape[-2:], dtype=torch.int64, device=META)
    loss = affinity_loss(network.affinity(predictions), label, 3)
    loss.backward()
    assert loss.device == META


def test_features_and_stego():
    settings = UssConfig(backbone=VIT, code_dim=8, samples=3, flip=True, scales=(1.0, 0.5))
    network = SemanticFeatures(settings).to(META)
    network.mean, network.projection = torch.zeros(8, device=META), torch.zeros(4, 8, device=META)
    assert network(IMAGES).device == META
    feat = network.backbone(IMAGES)
    pair = (network.head.drop(feat), network.head(feat))
    figures = stego_losses(settings, pair, pair)
    figures["loss"].backward()
    assert {value.device for value in figures.values()} == {META}


def test_losses_of_self_supervision():
    settings = SelfSupervisedConfig(prototypes=4, teacher_size=64, student_size=32)
    networks = [PrototypeNetwork(feature_network(VIT), 4).to(META) for _ in range(2)]
    figures = self_supervised_losses(*networks, IMAGES.sigmoid(), settings)
    figures["loss"].backward()
    assert {value.device for value in figures.values()} == {META}


def test_refinements():
    probs = torch.rand(2, 3, 32, 32, device=META)
    assert PAMR()(IMAGES[:2, :, :32, :32], probs).device == META
