"""The network of RS+EPM: activation maps and a decoder on one backbone."""

from torch import Tensor, nn

from core.config import WsssConfig
from core.models.backbones import Backbone
from core.models.deeplab import ASPP, Decoder


class RsEpmClassifier(nn.Module):
    """Class scores of cells, whose mean are the logits, and DeepLab v3+'s decoder beside them.

    Names below `aspp`, `decoder` and `classifier` are those of the released weights.
    """

    def __init__(self, config: WsssConfig, num_classes: int):
        super().__init__()
        settings = config.rsepm
        self.backbone = Backbone(config.backbone, (1, 2, 3, 4), config.output_stride)
        low, *_, last = self.backbone.dims
        self.classifier = nn.Conv2d(last, num_classes, 1, bias=False)
        self.aspp = ASPP(last, settings.width, settings.rates, dropout=0.5, mean_norm=True)
        self.decoder = Decoder(
            low, settings.low_width, settings.width, num_classes + 1, dropouts=(0.5, 0.1), last=3
        )

    def from_features(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Four stages -> (B, C, H/stride, W/stride) scores and (B, 1 + C, H/4, W/4) logits."""
        low, *_, last = features
        return self.classifier(last), self.decoder(low, self.aspp(last))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> the same."""
        return self.from_features(self.backbone(images))

    def activation(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/4, W/4) the decoder's probabilities of the classes."""
        return self(images)[1].float().softmax(1)[:, 1:]

    def parameter_groups(self, lr: float, head_lr: float) -> list[dict]:
        """The backbone and the new layers, each with its learning rate."""
        new = (self.classifier, self.aspp, self.decoder)
        return [
            {"params": list(self.backbone.parameters()), "lr": lr},
            {"params": [p for module in new for p in module.parameters()], "lr": head_lr},
        ]
