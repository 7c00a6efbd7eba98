"""Names in released checkpoints of STEGO and the WSSS methods, and what they are called here.

Some files hold a tensor under several names, or parts that labels do not need: IRNet's displacement
branch, an ImageNet head. These are left out; everything else must fit. The names are those that the
methods' sources give; no released file itself was at hand.
"""

from pathlib import Path

from torch import nn

from core.run import checkpoint
from core.uss.features import SemanticFeatures
from core.wsss.cam import CamClassifier
from core.wsss.pairs import AffinityNetwork, BoundaryNetwork
from core.wsss.rsepm_network import RsEpmClassifier
from core.wsss.seam_network import SeamClassifier

RESNET = [("resnet50.fc.", None), ("resnet50.", "backbone.net."), ("stage", None)]
COPIES = [(f"{name}.", None) for name in ("backbone", "newly_added", "edge_layers", "dp_layers")]
INDICES = [(name, None) for name in ("path_indices", "disp_target", "ind_")]  # of IRNet's pairs


def _same(*prefixes: str) -> checkpoint.Rules:
    return [(prefix, prefix) for prefix in prefixes]


RULES: dict[type[nn.Module], checkpoint.Rules] = {
    CamClassifier: [*RESNET, *COPIES, *_same("classifier.")],
    BoundaryNetwork: [
        *RESNET,
        *COPIES,
        *_same("fc_edge"),
        *INDICES,
        ("fc_dp", None),
        ("mean_shift.", None),
    ],
    SeamClassifier: [*_same("fc8.", "f8_3.", "f8_4.", "f9."), ("", "backbone.")],
    AffinityNetwork: [*_same("f8_3.", "f8_4.", "f8_5.", "f9."), ("", "backbone.")],
    SemanticFeatures: [  # STEGO's, by Lightning
        ("net.model.head.", None),
        ("net.model.", "backbone.net."),
        ("net.cluster1.", "head.cluster1."),
        ("net.cluster2.", "head.cluster2."),
        *(
            (f"{part}.", None)
            for part in ("linear_probe", "cluster_probe", "train_cluster_probe", "decoder")
        ),
    ],
    RsEpmClassifier: [
        ("model.fc.", None),
        ("model.", "backbone.net."),
        *_same("classifier.", "aspp.", "decoder."),
    ],
}


def load_published(network: nn.Module, path: str) -> nn.Module:
    """Loads a released checkpoint of one of these networks; see `core.run.checkpoint`."""
    own = ("mean",) if isinstance(network, SemanticFeatures) else ()
    return checkpoint.load_published(network, Path(path), RULES[type(network)], own)
