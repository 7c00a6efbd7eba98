import pytest
import torch
from torch.nn import functional as F

from core.crf.pamr import OFFSETS, PAMR


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_refinement_equals_a_naive_loop():
    images, masks, dilations = rand(1, 3, 6, 7), rand(1, 2, 6, 7, seed=1), (1, 2)
    near = []
    for y in range(6):
        for x in range(7):
            for d in dilations:
                for dy, dx in OFFSETS:
                    near.append((y, x, min(max(y + d * dy, 0), 5), min(max(x + d * dx, 0), 6)))
    expected = torch.zeros(2, 6, 7)
    for y in range(6):
        for x in range(7):
            places = [(b, a) for p, q, b, a in near if (p, q) == (y, x)]
            here = images[0, :, y, x]
            values = torch.stack([images[0, :, b, a] for b, a in places])
            spread = torch.cat([values, here.expand(len(dilations), 3)]).std(0)
            logits = -((values - here).abs() / (1e-8 + 0.1 * spread)).mean(1)
            for weight, (b, a) in zip(logits.softmax(0), places, strict=True):
                expected[:, y, x] += weight * masks[0, :, b, a]
    assert torch.allclose(PAMR(1, dilations)(images, masks)[0], expected, atol=1e-5)


def test_constant_mask_stays_constant():
    refined = PAMR(3)(rand(2, 3, 9, 9), torch.full((2, 4, 9, 9), 0.25))
    assert torch.allclose(refined, torch.tensor(0.25), atol=1e-5)


def test_mask_does_not_leak_over_a_colour_edge():
    images = torch.zeros(1, 3, 8, 8)
    images[..., 4:] = 1
    masks = rand(1, 1, 8, 8) * 0.1
    masks[..., 4:] += 0.9
    refined = PAMR(5, (1, 2))(images, masks)
    assert refined[..., :4].max() < 0.2 < 0.8 < refined[..., 4:].min()


def test_updates_of_a_batch_are_those_of_its_items_one_by_one():
    images, masks = rand(2, 3, 6, 7), rand(2, 3, 6, 7, seed=1)
    step = PAMR(1, (1, 2, 5))
    for image, mask, refined in zip(images, masks, PAMR(2, (1, 2, 5))(images, masks), strict=True):
        alone = step(image[None], step(image[None], mask[None]))
        assert torch.allclose(refined, alone[0], atol=1e-6)


def test_probabilities_stay_probabilities():
    masks = rand(1, 4, 12, 10, seed=1).softmax(1)
    refined = PAMR()(rand(1, 3, 12, 10), masks)
    assert torch.allclose(refined.sum(1), torch.ones(1, 12, 10), atol=1e-5)
    assert refined.min() >= masks.min() - 1e-6 and refined.max() <= masks.max() + 1e-6


def test_range_and_normalisation_of_the_image_do_not_matter():
    images, masks = rand(1, 3, 10, 10), rand(1, 2, 10, 10, seed=1)
    factor = torch.tensor([255.0, 4.0, 0.3])[None, :, None, None]
    assert torch.allclose(PAMR(3)(images * factor - 7, masks), PAMR(3)(images, masks), atol=1e-3)


def test_flat_image_gives_the_plain_mean_of_the_neighbours():
    masks = rand(1, 1, 3, 3)
    refined = PAMR(1, (1,))(torch.ones(1, 3, 3, 3), masks)
    assert torch.isclose(refined[0, 0, 1, 1], (masks.sum() - masks[0, 0, 1, 1]) / 8)


def test_image_of_another_size_is_resized_to_the_masks():
    images, masks = rand(1, 3, 20, 24), rand(1, 2, 10, 12, seed=1)
    small = F.interpolate(images, (10, 12), mode="bilinear", align_corners=True)
    assert torch.equal(PAMR(2)(images, masks), PAMR(2)(small, masks))


def test_type_of_the_masks_is_kept_and_no_gradient_recorded():
    refined = PAMR(1)(rand(1, 3, 5, 5), rand(1, 2, 5, 5).bfloat16().requires_grad_())
    assert refined.dtype == torch.bfloat16 and not refined.requires_grad


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        (rand(3, 5, 5), rand(1, 2, 5, 5), "images must be"),
        (rand(1, 3, 5, 5), rand(2, 5, 5), "masks must be"),
        (rand(1, 3, 5, 5), torch.ones(1, 2, 5, 5, dtype=torch.int64), "masks must be .*int64"),
        (rand(2, 3, 5, 5), rand(1, 2, 5, 5), "2 images for 1 masks"),
    ],
)
def test_wrong_input_is_refused(images, masks, message):
    with pytest.raises(ValueError, match=message):
        PAMR()(images, masks)


@pytest.mark.parametrize("settings", [{"iterations": -1}, {"dilations": ()}, {"dilations": (0, 1)}])
def test_setting_out_of_range_is_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        PAMR(**settings)
