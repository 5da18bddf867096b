"""VGG-16 (Simonyan and Zisserman 2015), under the names of torchvision's file."""

from torch import Tensor, nn
from torch.nn import functional as F

_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions before each halving


class VGG16(nn.Module):
    """VGG-16 without batch norm: 138,357,544 parameters.

    Its features are the second hidden layer after ReLU, which improved precision and recall compare
    (Kynkäänniemi et al. 2019, §3).
    """

    def __init__(self):
        super().__init__()
        layers = []
        width = 3
        for out, convs in _STAGES:
            for _ in range(convs):
                layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU(inplace=True)]
                width = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        hidden = [nn.Linear(width * 49, 4096), nn.ReLU(inplace=True), nn.Dropout()]
        hidden += [nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout()]
        self.classifier = nn.Sequential(*hidden, nn.Linear(4096, 1000))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits.

        Args:
            x: [N, 3, H, W], H and W at least 32, ImageNet's mean and standard deviation taken out.

        Returns:
            features [N, 4096], logits [N, 1000].
        """
        maps = F.adaptive_avg_pool2d(self.features(x), 7).flatten(1)
        features = self.classifier[:-1](maps)
        return features, self.classifier[-1](features)
