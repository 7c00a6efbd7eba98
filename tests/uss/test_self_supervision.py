import numpy as np
import torch
from PIL import Image

from core.data.lists import Split
from core.data.loader import RawImages
from core.uss.self_supervision import random_crops, random_mask, sinkhorn


def test_photographs_of_any_size_become_squares_of_one(tmp_path):
    paths = [tmp_path / f"{k}.png" for k in range(3)]
    for path, size in zip(paths, ((40, 64), (64, 40), (48, 48)), strict=True):
        image = np.zeros((*size, 3), np.uint8)
        image[size[0] // 2 - 12 : size[0] // 2 + 12, size[1] // 2 - 12 : size[1] // 2 + 12] = 255
        Image.fromarray(image).save(path)
    split = Split(("a", "b", "c"), tuple(paths), np.ones((3, 1), bool))
    images = [RawImages(split, 48)[k, 0]["image"] for k in range(3)]
    assert {(i.shape, i.dtype) for i in images} == {(torch.Size([3, 48, 48]), torch.uint8)}
    assert all(i[:, 24, 24].tolist() == [255] * 3 and not i[:, 0].any() for i in images)
    assert torch.equal(images[2].permute(1, 2, 0), torch.from_numpy(split.read_image(2)))


def test_sinkhorn_uses_every_prototype_alike():
    q = sinkhorn(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), 0.5, iterations=50)
    assert torch.allclose(q.sum(1), torch.ones(64), atol=1e-5)
    assert torch.allclose(q.sum(0), torch.full((8,), 8.0), atol=1e-2)


def test_crops_stay_inside_the_image():
    torch.manual_seed(0)
    theta = random_crops(200, 0.3, 1.0)
    reach = theta[:, [0, 1], [0, 1]].abs() + theta[:, :, 2].abs()
    assert reach.max() <= 1 + 1e-6 and theta[:, 0, 0].abs().min() >= 0.3


def test_masks_hide_at_most_their_share():
    torch.manual_seed(0)
    hidden = random_mask(50, 10, 0.6).float().mean((1, 2))
    assert hidden.max() <= 0.6 + 0.01 and hidden.min() >= 0 and hidden.std() > 0.05
