"""The similarity of Eq. 4, as tools draw it."""

import math

import torch
from torch.nn import functional as F

from tools.common.cuts import debiased_score


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_score_is_the_best_similarity_over_all_classes_of_the_image():
    feat = torch.tensor([[[1.0, 0.0, -1.0]], [[0.0, 2.0, 0.0]]])  # (2, 1, 3)
    centroids = torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    both = debiased_score(feat, centroids, torch.tensor([True, True]))
    assert torch.allclose(both, torch.tensor([[1.0, 1.0, 0.0]]))
    first = debiased_score(feat, centroids, torch.tensor([True, False]))
    assert torch.allclose(first, torch.tensor([[1.0, 0.0, 0.0]]))


def test_score_equals_the_naive_loop():
    feat, centroids, tags = rand(6, 4, 5, seed=5), rand(3, 6, seed=6), torch.tensor([1, 0, 1])
    score = debiased_score(feat, centroids, tags)
    for y in range(4):
        for x in range(5):
            best = max(F.cosine_similarity(feat[:, y, x], centroids[c], dim=0) for c in (0, 2))
            assert math.isclose(score[y, x], max(best, 0), abs_tol=1e-6)


def test_image_without_tags_is_similar_to_nothing():
    assert not debiased_score(rand(3, 2, 2), rand(2, 3), torch.zeros(2)).any()


def test_class_without_centroid_is_similar_to_nothing():
    assert not debiased_score(rand(3, 2, 2), torch.zeros(1, 3), torch.ones(1)).any()
