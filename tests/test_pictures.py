import torch

from core.data.labels import BIASED, IGNORE
from core.pictures import heat, label_colours, principal_components


def test_pictures_have_the_colours_of_labels_maps_and_features():
    feats = [torch.randn(5, 4, 6), torch.randn(5, 3, 3)]
    drawn = principal_components(feats)
    assert [d.shape for d in drawn] == [(3, 4, 6), (3, 3, 3)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, principal_components(feats), strict=True))
    label = torch.tensor([[[0, 1, BIASED, IGNORE]]])
    colours = label_colours(label)[0, :, 0].T.tolist()
    assert colours == [[0, 0, 0], [128, 0, 0], [255, 0, 255], [224, 224, 192]]
    grey = heat(torch.tensor([[[0.0, 2.0]], [[0.0, 0.0]]]), (1, 2))
    assert grey[0, 0].tolist() == [[0, 255]] and not grey[1].any()
