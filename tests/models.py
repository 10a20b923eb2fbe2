"""Tiny nets with the shapes of trouble, for `load_model("tests.models:NAME")`, and the lists of real ones."""

from collections import namedtuple

import torch
from torch import nn

from runtime.types import Preprocessing

SIZE = 32
IMAGE = Preprocessing(SIZE, SIZE, 36, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

QUICK_MODELS = ["torchvision:resnet18", "torchvision:squeezenet1_1", "torchvision:mobilenet_v3_large"]
ALL_MODELS = [
    *QUICK_MODELS,
    "torchvision:alexnet",
    "torchvision:vgg16",
    "torchvision:resnet50",
    "torchvision:densenet121",
    "torchvision:googlenet",
    "torchvision:efficientnet_b0",
    "torchvision:convnext_tiny",
    "torchvision:vit_b_16",
    "torchvision:swin_t",
    "torchvision:lraspp_mobilenet_v3_large",  # segmentation: returns a dict
    "timm:xception",
    "timm:darknet53",
    "timm:inception_v4",
    "timm:res2net50_26w_4s",  # splits into views that skip ahead
    "timm:mobilevit_s",  # convolutions and attention
    "timm:hrnet_w18_small",  # four branches that exchange tensors
]

Pair = namedtuple("Pair", ["first", "second"])


def example(batch_size: int = 1) -> torch.Tensor:
    return torch.randn(batch_size, 3, SIZE, SIZE)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.body = nn.Conv2d(16, 32, 3, padding=1)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout()
        self.hidden = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.act(self.norm(self.stem(x))))
        x = self.mean(self.act(self.body(x))).flatten(1)
        return self.head(self.act(self.hidden(self.drop(x))))


class Residual(nn.Module):
    """In-place adds and activations on tensors that skip over other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 16, 1, stride=2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = torch.relu_(self.norm(self.stem(x)))
        y = torch.relu_(self.first(skip))
        y = self.second(nn.functional.dropout(y, training=self.training))
        y += skip
        torch.relu_(y)
        z = self.third(y)
        skip = skip.mul_(0.5)  # written after its readers above, read again below
        z = z + skip[:, :, ::2, ::2]
        return self.head(z.mean((2, 3)))


class Branching(nn.Module):
    """Four branches, concat, split; a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.left = nn.Conv2d(12, 8, 1)
        self.right = nn.Conv2d(12, 8, 3, padding=1, groups=4)
        self.far = nn.Conv2d(6, 8, 3, padding=1)
        self.mix = nn.Conv2d(24, 12, 1)
        self.classes = nn.Linear(12, 10)
        self.box = nn.Linear(12, 4)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 12).view(1, 12, 1, 1))

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        x = torch.nn.functional.silu(self.stem(x))
        low, high = x.chunk(2, dim=1)
        branches = [torch.relu_(self.left(x)), self.right(x), self.far(torch.sigmoid(low))]
        y = self.mix(torch.cat(branches, dim=1)) * self.scale
        pooled = (y + torch.cat([high, low], dim=1)).mean((2, 3))
        return {
            "classes": self.classes(pooled),
            "boxes": Pair(self.box(pooled).sigmoid_(), None),
            "aux": [pooled, (y.amax((2, 3)), 3, "note")],
        }


class Views(nn.Module):
    """Writes to a part of a tensor that is read again: only torch's functional form can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x[:, :4].mul_(2.0)
        y = self.body(x)
        y.flatten(2).add_(x.flatten(2))
        return self.head(y.amax((2, 3)))


class Reordered(nn.Module):
    """In-place operations that join a layer before readers of the same memory, and one on what may be a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.wide = nn.Linear(64, 64)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 8 * 4, 10)
        self.side = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        first, second = x.flatten(2), x.flatten(2)
        y = self.wide(first)  # reads the memory that the next line writes to
        z = torch.relu_(second) + y
        right = self.body(z.unflatten(2, (8, 8))).chunk(2, dim=3)[1]
        w = right.flatten(1).mul_(2.0)  # a copy here, but a view of `right` where that arrives without gaps
        return self.head(w) + self.side(right.mean((2, 3)))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.table(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


def chain() -> tuple[nn.Module, torch.Tensor]:
    return Chain(), example()


def chain_image() -> tuple[nn.Module, torch.Tensor, Preprocessing]:
    return Chain(), example(), IMAGE


def residual() -> tuple[nn.Module, torch.Tensor]:
    return Residual(), example()


def branching() -> tuple[nn.Module, torch.Tensor]:
    return Branching(), example()


def views() -> tuple[nn.Module, torch.Tensor]:
    return Views(), example()


def reordered() -> tuple[nn.Module, torch.Tensor]:
    return Reordered(), example()


def tokens() -> tuple[nn.Module, torch.Tensor]:
    return Tokens(), torch.arange(6).view(1, 6)


class Attention(nn.Module):
    """Patches that attend to each other, as torch's own module does it: fused where torch may."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.norm = nn.LayerNorm(16)
        self.attend = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        y, _ = self.attend(y, y, y, need_weights=False)
        return self.head((x + y).mean(1))


def attention() -> tuple[nn.Module, torch.Tensor]:
    return Attention(), example()


class Gated(nn.Module):
    """Two tileable stretches: a gate between them looks at whole maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.body = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.last = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.deep(torch.relu(self.stem(x))))
        x = x * torch.sigmoid(self.squeeze(self.mean(x)))
        x = torch.relu(self.last(torch.relu(self.body(x))))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def gated() -> tuple[nn.Module, torch.Tensor]:
    return Gated(), example()
