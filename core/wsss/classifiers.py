"""The classifier of each WSSS method."""

from dataclasses import replace

import torch

from core.config import WsssConfig
from core.wsss.cam import CamClassifier
from core.wsss.pairs import BoundaryNetwork
from core.wsss.rsepm_network import RsEpmClassifier
from core.wsss.seam_network import SeamClassifier

Classifier = CamClassifier | SeamClassifier | RsEpmClassifier


def build_classifier(settings: WsssConfig, num_classes: int) -> Classifier:
    """The configured method's network, which has `activation` and `parameter_groups`."""
    if settings.weights:  # of all of it
        settings = replace(settings, backbone=settings.backbone.without_weights())
    if settings.method in ("irn", "advcam", "rsepm"):
        with torch.device(
            "meta"
        ):  # refuses backbones without boundaries before anything is trained
            BoundaryNetwork(settings.backbone.without_weights())
    if settings.method == "seam":
        return SeamClassifier(settings, num_classes)
    if settings.method == "rsepm":
        return RsEpmClassifier(settings, num_classes)
    return CamClassifier(settings, num_classes)
