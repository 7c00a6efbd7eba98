"""The methods' own code on given inputs: numbers that it produced, and what this project makes.

Each number was computed by the function, or the lines of a script, that is named beside it, run
apart from this project on the same inputs, without its GPU calls and, for Leopart's foreground,
with SciPy's labelling for skimage's. Inputs come from NumPy's generator with fixed seeds. Where a
block differs on purpose, a test states by how much. docs/not_reproduced.md has the table of all
differences.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.complement import segmentation_loss
from core.crf.dense import make_crf
from core.crf.pamr import PAMR
from core.inference import multi_scale
from core.models.backbones import BackboneConfig
from core.models.deeplab import DeepLabV1Head, DeepLabV2Head, DeepLabV3PlusHead, build_deeplab
from core.run.loop import poly
from core.segmenter import SegmentationConfig
from core.uss import leopart, stego
from core.uss.self_supervision import sinkhorn
from core.wsss import affinity, irn, psa, seam
from core.wsss.advcam import AdvCamConfig, adversarial_cam
from core.wsss.irn import IrnConfig
from core.wsss.psa import PsaConfig

RESNET = BackboneConfig("resnet18", {"channels": [8, 8, 16, 16]}, "none")


def given(seed: int, *shape: int) -> Tensor:
    """Standard normal float32."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def labels(seed: int, *shape: int, classes: int = 4, ignored: float = 0.2) -> Tensor:
    """Labels 0 to classes - 1, a share of them 255."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, classes, shape)
    drawn[generator.random(shape) < ignored] = 255
    return torch.from_numpy(drawn)


def blocks(maps: Tensor, side: int) -> Tensor:
    """Every cell becomes a square of that side."""
    return maps.repeat_interleave(side, -1).repeat_interleave(side, -2)


def digest(values: Tensor) -> list[float]:
    """Mean, mean magnitude and three elements."""
    flat = values.detach().double().flatten()
    n = len(flat)
    chosen = (flat.mean(), flat.abs().mean(), flat[n // 5], flat[n // 2], flat[n - n // 7 - 1])
    return [float(x) for x in chosen]


def close(found: Tensor | float, expected: list[float] | float, rel: float = 1e-4) -> bool:
    """Whether a number, or the digest of a tensor, is the recorded one."""
    found = found if isinstance(found, float) else digest(found)
    small = 1e-5 * (expected[1] if isinstance(expected, list) else 1)
    return found == pytest.approx(expected, rel=rel, abs=small)


def filled(network: nn.Module, seed: int) -> nn.Module:
    """Parameters in their order from seeds, scales near 1; in evaluation mode."""
    for k, (name, p) in enumerate(network.named_parameters()):
        value = given(seed + k, *p.shape) / (p[0].numel() ** 0.5 if p.ndim > 1 else 4)
        p.data = value + 1 if p.ndim == 1 and name.endswith("weight") else value
    return network.eval()


# IRNet: github.com/jiwoon-ahn/irn at 057cea6


@pytest.mark.parametrize(
    ("radius", "count", "cells", "down", "moment"),
    [(5, 34, 242, 68, 304), (10, 152, 2134, 639, 12800)],
)
def test_irnet_pairs_and_paths(radius, count, cells, down, moment):  # misc/indexing.py PathIndex
    offsets = affinity.pair_offsets(radius)
    assert len(offsets) == count and sum(len(affinity.path(o)) for o in offsets) == cells
    assert sum(dy for dy, _ in offsets) == down
    assert sum(dy * dx**2 for dy, dx in offsets) == moment


@pytest.mark.parametrize(
    ("radius", "loss", "gradient"),
    [
        (5, 0.870672, [0.0028314, 0.00323857, 0.000732998, 0.0, 0.0]),
        (10, 0.984483, [0.00422249, 0.00439768, 0.0, 0.0, 0.0]),
    ],
)
def test_irnet_loss(radius, loss, gradient):  # edge_to_affinity, step/train_irn.py
    boundary = given(1, 1, 24, 28).sigmoid().requires_grad_(True)
    pairs = affinity.path_affinity(boundary, radius)
    found = affinity.affinity_loss(pairs, blocks(labels(2, 6, 7), 4)[None], radius)
    found.backward()
    assert close(found.item(), loss) and close(boundary.grad, gradient)


def test_irnet_walk_and_label_behind_it():  # propagate_to_edge, step/make_sem_seg_labels.py
    boundary = given(3, 1, 12, 16).mul(2).sigmoid()[0]
    maps = given(4, 2, 12, 16).relu()
    maps = maps / maps.amax((1, 2), keepdim=True)
    walked = irn.walk(boundary, maps, IrnConfig(exponent=1, beta=10, doublings=8))
    expected = [0.0764965, 0.0764965, 4.56477e-10, 5.78197e-16, 0.101036]
    assert close(walked, expected)
    label = irn.label_of_walked_maps(walked, np.array([3, 7]), (45, 62), 0.35)
    assert [int((label == k).sum()) for k in (0, 3, 7)] == [1441, 682, 667]
    assert int(label[-1].sum()) == 87 and int((label * np.arange(62)).sum()) == 202665


def test_irnet_confident_label():  # step/cam_to_ir_label.py, misc/imutils.crf_inference_label
    image = torch.stack([blocks(given(5 + c, 6, 8), 8) for c in range(3)], -1) * 30 + 128
    image = (image + 4 * given(60, 48, 64, 3)).clamp(0, 255).byte().numpy()
    maps = F.interpolate(given(8, 1, 2, 3, 4).sigmoid(), (48, 64), mode="bilinear")[0] * 0.5
    crf = make_crf(IrnConfig().crf)
    label = irn.seed_by_thresholds(
        image, np.array([3, 7]), maps.numpy(), IrnConfig(foreground=0.30, background=0.22), crf
    )
    found = [int((label == k).sum()) for k in (0, 3, 7, 255)]
    assert found == pytest.approx([183, 694, 892, 1303], abs=3)  # with pydensecrf


# PSA and SEAM: github.com/jiwoon-ahn/psa at 5f05cd6, github.com/YudeWang/SEAM at 17a8eb6


def test_psa_loss():  # voc12/data.py ExtractAffinityLabelInRadius, resnet38_aff.py, train_aff.py
    features = given(9, 1, 8, 15, 15).requires_grad_(True)
    pairs = affinity.feature_affinity(features, 5)
    loss = affinity.affinity_loss(pairs, blocks(labels(10, 5, 5), 3)[None], 5)
    loss.backward()
    assert close(loss.item(), 0.782534)
    assert close(features.grad, [3.14534e-13, 0.000241415, 2.59245e-05, 0.0, -0.000322156])


def test_psa_walk_differs_in_pairs_of_the_frame_and_in_cells():  # infer_aff.py
    features, size, config = given(11, 1, 8, 13, 17), (99, 131), PsaConfig()
    maps = blocks(given(12, 2, 4, 5).sigmoid(), 32)[:, :99, :131]
    margin = config.radius - 1
    padded = F.pad(features, (margin, margin, 0, margin))
    pairs = affinity.feature_affinity(padded, config.radius)[0]
    # There no pair has its upper cell in the outer four on the left, right and lower sides, and
    # maps with a background are padded to whole cells and averaged.
    theirs = pairs.clone()
    theirs[:, -margin:], theirs[:, :, :margin], theirs[:, :, -margin:] = 0, 0, 0
    scores = torch.cat([(1 - maps.amax(0, keepdim=True)) ** config.walk_exponent, maps])
    scores = F.avg_pool2d(F.pad(scores, (0, 5, 0, 5)), 8)
    walked = affinity.random_walk(scores, theirs, config.radius, config.beta, config.doublings)
    assert close(walked, [0.288726, 0.288726, 0.00545399, 0.394456, 0.395619])
    # Here all pairs inside the image are walked along: 0, 7413, 5556 there.
    network = psa.AffinityNetwork(RESNET, config)
    label = network.label(features[0], np.array([1, 2]), maps, size)
    counts = [int((label == k).sum()) for k in range(3)]
    assert counts == pytest.approx([0, 7413, 5556], abs=0.08 * label.size)
    assert counts != [0, 7413, 5556]


def test_seam_losses():  # train_SEAM.py, tool/visualization.py max_norm
    maps = [
        given(seed, 2, 5, side, side).requires_grad_(True)
        for seed, side in ((13, 20), (14, 20), (15, 6), (16, 6))
    ]
    tags = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 1]])
    views = (maps[0], maps[1]), (maps[2], maps[3])
    classes = sum(seam.classification_loss(*view, tags) for view in views) / 2
    losses = [classes, *seam.consistency_losses(*views, tags)]
    assert [x.item() for x in losses] == pytest.approx([0.712797, 0.142715, 1.38905], rel=1e-5)
    sum(losses).backward()
    gradients = [
        [-1.07906e-05, 8.13629e-05, 7.48703e-05, 0.0, -7.34707e-05],
        [1.28118e-05, 8.94825e-05, 0.0, -0.00556074, 0.0],
        [-1.00496e-05, 0.000899002, 0.000990247, 0.0, 0.000756855],
        [-0.000208761, 0.000802183, 0.0, 0.0, 0.0],
    ]
    assert all(close(m.grad, g) for m, g in zip(maps, gradients, strict=True))


def test_seam_pixel_correlation():  # network/resnet38_SEAM.py PCM, behind its f9
    found = seam.pixel_correlation(given(17, 2, 5, 7, 9).relu(), given(18, 2, 12, 7, 9))
    assert close(found, [0.360271, 0.360271, 0.605526, 0.288051, 0.434392])


# PAMR: github.com/visinf/1-stage-wseg at bebc9a6, models/mods/pamr.py


def test_pamr():
    images, masks = given(19, 1, 3, 24, 30), given(20, 1, 4, 24, 30).softmax(1)
    found = PAMR(10, (1, 2, 4, 8, 12, 24))(images, masks)
    assert close(found, [0.25, 0.25, 0.469238, 0.367656, 0.127818])


# STEGO: github.com/mhamilton723/STEGO at 0728bdc, src/modules.py


def test_stego_correspondence_loss():  # ContrastiveCorrelationLoss.helper, released settings
    feat = given(21, 3, 12, 5, 5), given(22, 3, 12, 5, 5)
    code = given(23, 3, 6, 5, 5).requires_grad_(True), given(24, 3, 6, 5, 5)
    loss, similarity = stego.correspondence_loss(feat, code, 0.12)
    loss.backward()
    assert close(loss.item(), 0.0223985)
    assert close(code[0].grad, [2.21017e-06, 7.68933e-05, -3.64417e-06, 7.20047e-06, -3.37524e-05])
    assert close(similarity, [0.00259636, 0.345064, -0.340806, -0.259593, -0.155272])


def test_stego_samples_have_rows_and_columns_exchanged():  # sample
    points = given(28, 2, 5, 5, 2).tanh()
    found = stego.sample_points(given(27, 2, 4, 6, 7), points.transpose(1, 2))
    assert close(found, [0.0105147, 0.573344, 0.503518, 0.132209, -1.11095])


def test_stego_cluster_probe():  # ClusterLookup with alpha None
    probe = stego.ClusterProbe(7, 6)
    probe.clusters.data = given(25, 7, 6)
    loss = probe(given(26, 2, 6, 5, 5))
    loss.backward()
    assert close(loss.item(), -0.584754)
    expected = [0.00110472, 0.00629482, 0.00374951, -0.00872423, 0.00370938]
    assert close(probe.clusters.grad, expected)


# Leopart: github.com/MkuuWaUjinga/leopart at 840e365


def test_leopart_assignments():  # src/leopart.py sinkhorn
    similarity = F.normalize(given(29, 50, 16), dim=1) @ F.normalize(given(30, 9, 16), dim=1).T
    expected = [0.111111, 0.111111, 0.0125792, 5.89818e-08, 1.18333e-05]
    assert close(sinkhorn(similarity, 0.05), expected)


def test_leopart_foreground():  # experiments/utils.py process_attentions
    mask = leopart.foreground(given(31, 4, 14, 14).mul(1.5).exp(), 0.6)
    assert mask.sum((1, 2)).tolist() == [53, 45, 48, 53]
    assert int((mask * torch.arange(14)).sum()) == 1277


def test_leopart_aligned_overlaps():  # torchvision.ops.roi_align, aligned, adaptive samples
    boxes = torch.tensor([[20.0, 10, 130, 200], [0, 0, 224, 224], [3.2, 100.5, 60.9, 140.1]]) / 224
    found = leopart.roi_align(given(32, 3, 5, 14, 14), boxes)
    assert close(found, [-0.017901, 0.466646, 0.0253643, 0.188416, -0.674139])


def test_leopart_loss():  # src/leopart.py spatial_loss: two large crops, one small one
    boxes = torch.tensor(
        [
            [[0.0, 0.1, 0.8, 0.9], [0.2, 0.0, 0.9, 0.7], [0.3, 0.3, 0.6, 0.7]],
            [[0.1, 0.0, 1.0, 0.8], [0.0, 0.3, 0.7, 1.0], [0.2, 0.4, 0.5, 0.6]],
        ]
    )
    targets = [given(33 + k, 2, 6, 14, 14).mul(2).softmax(1) for k in range(2)]
    scores = [given(35 + k, 2, 6, n, n).requires_grad_(True) for k, n in enumerate((14, 14, 6))]
    cosines = [s.tanh() for s in scores]
    everywhere = [torch.ones(2, 14, 14, dtype=torch.bool)] * 2
    loss = leopart.part_loss(targets, cosines, everywhere, boxes)
    loss.backward(retain_graph=True)
    assert close(loss.item(), 4.91614)
    expected = [-0.000477115, 0.0071302, -0.00749539, 0.0635104, -0.0149577]
    assert close(scores[2].grad, expected, rel=1e-3)
    # With a mask its code loses some places to rounding, as it asks for a mean of 1 or more.
    masks = [blocks(given(40 + k, 2, 1, 7, 7), 2)[:, 0] > -1 for k in range(2)]
    masked = leopart.part_loss(targets, cosines, masks, boxes)
    assert close(masked.item(), 4.74901, rel=0.01)


# DeepLab: github.com/kazuto1011/deeplab-pytorch at f3dc79f (models: 2760e35),
# YudeWang/semantic-segmentation-codebase at 13b92f0, jfzhang95/pytorch-deeplab-xception at 5ee8735


def head_settings(rates: tuple[int, ...], **changes) -> SegmentationConfig:
    return SegmentationConfig(backbone=RESNET, rates=rates, **changes)


def maps_at_two_strides() -> tuple[Tensor, Tensor]:
    return given(101, 2, 4, 18, 22), given(100, 2, 5, 9, 11)


def test_deeplab_v1_head():  # lib/net/deeplabv1.py
    low, deep = maps_at_two_strides()
    head = filled(DeepLabV1Head(4, 5, head_settings((12,), aspp_dim=8), 4), 110)
    logits = head(low, deep)
    assert close(logits, [-0.132671, 0.212572, 0.0461687, -0.330189, -0.416421])
    # It enlarges logits with aligned corners, which moves few labels: 0, 7552, 101, 5019 there.
    label = F.interpolate(logits, (72, 88), mode="bilinear").argmax(1)
    counts = [int((label == k).sum()) for k in range(4)]
    assert counts == pytest.approx([0, 7552, 101, 5019], abs=0.03 * label.numel())


def test_deeplab_v2_head():  # libs/models/deeplabv2.py
    low, deep = maps_at_two_strides()
    head = filled(DeepLabV2Head(4, 5, head_settings((6, 12, 18, 24)), 4), 130)
    assert close(head(low, deep), [-0.350458, 0.695756, 0.341283, -0.415082, -0.238649])


def test_deeplab_v3plus_head():  # modeling/aspp.py, modeling/decoder.py
    # Its mean branch has a bias here and a normalisation there (exchanged for these numbers), and
    # its decoder aligns corners, which changes values by a tenth.
    low, deep = maps_at_two_strides()
    head = filled(DeepLabV3PlusHead(4, 5, head_settings((2, 4, 6), aspp_dim=8, low_dim=6), 4), 150)
    logits = head(low, deep)
    assert close(logits, [-0.0483114, 0.282332, -0.139651, -0.015653, -0.522324])
    aligned = [-0.0487383, 0.282254, -0.183736, 0.00567183, -0.519202]
    assert digest(logits) == pytest.approx(aligned, abs=0.05)


class Pooled(nn.Module):
    """Stands for a backbone of stride 8."""

    def forward(self, images: Tensor) -> tuple[None, Tensor]:
        return None, F.avg_pool2d(images, 8)


def test_deeplab_v2_scales_and_loss():  # libs/models/msc.py, main.py resize_labels and train
    config = head_settings((6, 12), network="deeplabv2", train_scales=(0.5, 0.75))
    network = build_deeplab(config, 3)
    network.backbone, network.head = Pooled(), filled(DeepLabV2Head(0, 3, config, 4), 190)
    levels = network.training_logits(given(200, 2, 3, 81, 65))
    assert [tuple(x.shape[2:]) for x in levels] == [(10, 8), (5, 4), (7, 6), (10, 8)]
    assert close(levels[-1], [0.124955, 0.207518, -0.110137, 0.24402, 0.444537])
    loss = segmentation_loss(levels, labels(201, 2, 81, 65), at_cells=network.head.at_cells)
    loss.backward()
    assert close(loss.item(), 5.63078)
    gradient = network.head.branches[0].weight.grad
    assert close(gradient, [-0.000152002, 0.00273573, 0.00172096, -0.00157525, 0.00139813], 1e-3)


def test_polynomial_schedule():  # misc/torchutils.py PolyOptimizer, in SEAM and PSA as well
    rates = [0.1 * poly(200)(k) for k in (0, 57, 199)]
    assert rates == pytest.approx([0.1, 0.0739393, 0.000849323])


# RS+EPM: github.com/shjo-april/RecurSeed_and_EdgePredictMix at 09d5aa6


def test_rsepm_inference_takes_the_nearest_cell():  # core/networks.py forward_with_scales
    weight = given(230, 4, 3, 1, 1)

    def classes(images: Tensor) -> Tensor:  # stands for the decoder at stride 4
        return F.conv2d(F.avg_pool2d(images, 4, ceil_mode=True), weight).softmax(1)[:, 1:]

    found = multi_scale(classes, given(231, 1, 3, 50, 70), (1.0, 2.0), mode="nearest")
    assert close(found, [0.257527, 0.257527, 0.110512, 0.278814, 0.100898])


# AdvCAM: github.com/jbeomlee93/AdvCAM at 51bfa8c, obtain_CAM_masking.py and gradCAM.py


class SmallClassifier(nn.Module):
    """One convolution and a classifier, in double precision."""

    def __init__(self):
        super().__init__()
        self.conv = filled(nn.Conv2d(3, 6, 3, 4, 1), 210).double()
        self.classifier = nn.Conv2d(6, 3, 1, bias=False).double()
        self.classifier.weight.data = given(220, 3, 6, 1, 1).double() / 2

    def backbone(self, images: Tensor) -> tuple[None, Tensor]:
        return None, self.conv(images).relu()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, [0.0800864, 0.0800864, 0.11046, 0.147936, 0.100684]),
        (9, [0.733764, 0.733764, 0.996395, 1.30999, 0.902249]),
    ],
)
def test_advcam_climb(steps, expected):
    image = given(221, 3, 24, 32).double()
    views = torch.stack([image, image.flip(-1)])
    found = adversarial_cam(SmallClassifier(), views, 1, steps, AdvCamConfig())
    assert close(found, expected)
