from types import SimpleNamespace

import numpy as np
import torch
from conftest import CLASSES
from torch import nn

from core.data.lists import read_split
from core.data.settings import DataConfig
from core.models.backbones import BackboneConfig
from core.wsss.advcam import AdvCamConfig, AdversarialCam, adversarial_cam, map_over_devices
from core.wsss.cam import CamClassifier


class Linear(nn.Module):
    """Features are the image itself; class k is channel k, class 2 is minus channel 0."""

    def __init__(self):
        super().__init__()
        self.backbone = lambda images: (None, images)
        self.classifier = nn.Conv2d(3, 3, 1, bias=False)
        weight = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0]])
        self.classifier.weight = nn.Parameter(weight[:, :, None, None])


def pair(image: torch.Tensor) -> torch.Tensor:
    return torch.stack([image, image.flip(-1)])


def test_first_map_is_grad_cam_of_the_image():
    image = torch.tensor([[[1.0, 0.5]], [[0.0, 1.0]], [[0.0, 0.0]]])
    found = adversarial_cam(Linear(), pair(image), 0, 1, AdvCamConfig())
    # d relu(x0) / d x0 is 1 at all 4 places of the two views; summed over places and divided by 4
    # the weight of channel 0 is 2 / 4, and both views show the same map.
    assert torch.allclose(found, torch.tensor([[1.0, 0.5]]))


def test_step_raises_its_class_lowers_the_others_and_keeps_to_the_range():
    image = torch.full((3, 2, 2), 0.5)
    image[2, 0, 0], image[2, 1, 1] = 0.0, 1.0
    config = AdvCamConfig(penalty=0, step=0.1)
    maps = [adversarial_cam(Linear(), pair(image), 0, steps, config) for steps in (1, 2, 12)]
    # Weight of channel 0: 4 / 8, two views: 2 * 0.5 * 0.5 at first, and 2 * 0.5 * 0.6 after a step.
    assert torch.allclose(maps[0], torch.full((2, 2), 0.5))
    assert torch.allclose(maps[1] - maps[0], torch.full((2, 2), 0.6))
    assert (maps[2] <= 12 * 1.0).all()  # clamped to the image's largest value, 1


def test_penalty_holds_back_what_is_bright_already():
    image = torch.zeros(3, 1, 4)
    image[0, 0] = torch.tensor([1.0, 0.2, 0.2, 0.2])
    image[2, 0, 0] = 2.0  # leaves room above
    free = adversarial_cam(Linear(), pair(image), 0, 6, AdvCamConfig(penalty=0))
    held = adversarial_cam(Linear(), pair(image), 0, 6, AdvCamConfig(penalty=7))
    # Means over the six steps: 1 and 0.2 at first.
    assert free[0, 0] / 6 > 1.15 and abs(held[0, 0] / 6 - 1) < 0.1
    assert held[0, 1] / 6 > 0.3


def test_maps_of_all_classes_and_scales_have_a_quarter_of_the_size():
    torch.manual_seed(0)
    backbone = BackboneConfig("resnet18", {"channels": [8, 8, 16, 16]}, "none")
    image = torch.randint(0, 256, (50, 66, 3), dtype=torch.uint8).numpy()
    tags = np.array([[False, True, False, True], [False] * 4])
    split = SimpleNamespace(read_image=lambda index: image, tags=tags)
    config = AdvCamConfig(steps=3, scales=(0.5, 1.0))
    climb = AdversarialCam(CamClassifier(backbone, 4).eval(), split, config)
    climb.to(torch.device("cpu"))
    assert climb(0).shape == (2, 13, 17) and (climb(0) >= 0).all()
    assert climb(1).shape == (0, 13, 17)


def test_images_shared_out_among_processes_give_the_same_maps_in_order(tiny_data):
    data = DataConfig(root=str(tiny_data), classes=tuple(CLASSES))
    split = read_split(data, "train")
    backbone = BackboneConfig("resnet18", {"channels": [8, 8, 16, 16]}, "none")
    climb = AdversarialCam(
        CamClassifier(backbone, 8).eval(), split, AdvCamConfig(steps=2, scales=(1.0,))
    )
    cpu = torch.device("cpu")
    alone, shared = (dict(map_over_devices(climb, [5, 2, 9], [cpu] * n)) for n in (1, 2))
    assert [*alone] == [*shared] == [5, 2, 9]
    for index, maps in alone.items():
        assert maps.shape == (split.tags[index].sum(), 32, 32)
        assert np.allclose(maps, shared[index], rtol=1e-4, atol=1e-5 * maps.max())
