import torch

from core.self_supervision import random_crops, random_mask, sinkhorn


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
