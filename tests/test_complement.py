"""Filling of biased pixels by a teacher: its prior, and its refinement on any device."""

import pytest
import torch

from core.complement import Complement, ComplementConfig
from core.crf.dense import CrfConfig
from core.data.labels import BIASED


def filled(teacher, label, **settings) -> torch.Tensor:
    config, device = ComplementConfig(**settings), torch.device("cpu")
    images, tags = torch.zeros(len(label), 3, *label.shape[1:]), torch.ones(len(label), 1)
    return Complement(config, teacher, 1, device).submit(images, label, tags)()


@pytest.mark.parametrize(
    ("prior", "objects"), [(0.5, 2), (0.1, 1), (0.02, 0)], ids=["paper", "a tenth", "hardly any"]
)
def test_prior_decides_what_a_teacher_must_be_sure_of(prior, objects):
    """Four pixels of which the teacher gives odds of 1/3, 2, 12 and 12 to the class."""
    logits = torch.tensor([1 / 3, 2.0, 12.0, 12.0]).log()
    maps = torch.stack([torch.zeros(4), logits])[None, :, None]  # (1, 2, 1, 4)
    label = torch.tensor([[[BIASED, BIASED, BIASED, 0]]])
    completed, weight, _ = filled(lambda images: maps, label, refine="none", fill_prior=prior)
    assert completed[0, 0, :3].sum() == objects and completed[0, 0, 3] == 0  # not biased
    expected = [1 / 4, 2 / 3, 12 / 13, 1]  # Eq. 6 takes the teacher's own probabilities
    torch.testing.assert_close(weight[0, 0], torch.tensor(expected))


def test_refinement_by_torch_fills_like_that_in_threads():
    torch.manual_seed(0)
    logits = torch.nn.functional.interpolate(torch.randn(3, 2, 4, 4), (24, 24), mode="bilinear")
    label = torch.zeros(3, 24, 24, dtype=torch.int64)
    label[:2, :, :16], label[0, :4] = BIASED, 1
    found = [
        filled(lambda images: logits[:2], label, crf=CrfConfig(backend, sxy_bilateral=8))[0]
        for backend in ("numba", "torch")
    ]
    assert (found[0] == found[1]).float().mean() > 0.999 and 0 < (found[0][1] == 1).sum() < 384
