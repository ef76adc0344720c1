"""Published models as lists of parameter shapes, and the same models in plain PyTorch for whole training steps.

Shapes are functions of the published configurations, in the order of the modules; linear layers store (outputs,
inputs), convolutions (outputs, inputs, height, width). The sums agree with the published numbers of parameters
(tests/test_bench_gpu.py), and the shapes with the modules of `build`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

Shapes: TypeAlias = list[tuple[int, ...]]


@dataclass(frozen=True)
class ResNet:
    """He et al. 2016 (arXiv 1512.03385), Table 1."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool
    width: int = 64
    classes: int = 1000
    image: int = 224


@dataclass(frozen=True)
class ViT:
    """Dosovitskiy et al. 2021 (arXiv 2010.11929), Table 1."""

    layers: int
    width: int
    mlp: int
    heads: int
    patch: int
    image: int = 224
    classes: int = 1000


@dataclass(frozen=True)
class GPT2:
    """Radford et al. 2019, Table 2; the output layer shares the token embedding."""

    layers: int
    width: int
    heads: int
    vocabulary: int = 50257
    context: int = 1024


RESNET18 = ResNet((2, 2, 2, 2), bottleneck=False)
RESNET50 = ResNet((3, 4, 6, 3), bottleneck=True)
VIT_B16 = ViT(layers=12, width=768, mlp=3072, heads=12, patch=16)
GPT2_124M = GPT2(layers=12, width=768, heads=12)
GPT2_355M = GPT2(layers=24, width=1024, heads=16)


def resnet(config: ResNet) -> Shapes:
    """Convolutions without bias, each with a batch normalisation; the shortcut has one where the shape changes."""
    shapes: Shapes = []

    def convolution(outputs: int, inputs: int, size: int) -> None:
        shapes.extend([(outputs, inputs, size, size), (outputs,), (outputs,)])

    inputs = config.width
    convolution(inputs, 3, 7)
    for stage, blocks in enumerate(config.blocks):
        inner = config.width * 2**stage
        outer = 4 * inner if config.bottleneck else inner
        for block in range(blocks):
            if config.bottleneck:
                convolution(inner, inputs, 1)
                convolution(inner, inner, 3)
                convolution(outer, inner, 1)
            else:
                convolution(inner, inputs, 3)
                convolution(outer, inner, 3)
            if block == 0 and (stage > 0 or inputs != outer):
                convolution(outer, inputs, 1)
            inputs = outer
    return [*shapes, (config.classes, inputs), (config.classes,)]


def vit(config: ViT) -> Shapes:
    """Class token, positions, patch convolution, encoder blocks, final normalisation, head."""
    width = config.width
    tokens = (config.image // config.patch) ** 2 + 1
    norm: Shapes = [(width,), (width,)]
    block: Shapes = [
        *norm, (3 * width, width), (3 * width,), (width, width), (width,),
        *norm, (config.mlp, width), (config.mlp,), (width, config.mlp), (width,),
    ]  # fmt: skip
    start: Shapes = [(1, 1, width), (1, tokens, width), (width, 3, config.patch, config.patch), (width,)]
    return [*start, *block * config.layers, *norm, (config.classes, width), (config.classes,)]


def gpt2(config: GPT2) -> Shapes:
    """Token and position embeddings, blocks of attention and MLP, final normalisation."""
    width = config.width
    norm: Shapes = [(width,), (width,)]
    block: Shapes = [
        *norm, (3 * width, width), (3 * width,), (width, width), (width,),
        *norm, (4 * width, width), (4 * width,), (width, 4 * width), (width,),
    ]  # fmt: skip
    return [(config.vocabulary, width), (config.context, width), *block * config.layers, *norm]


Model: TypeAlias = ResNet | ViT | GPT2

MODELS: dict[str, Model] = {
    "GPT-2 124M": GPT2_124M,
    "ResNet-50": RESNET50,
    "ViT-B/16": VIT_B16,
    "GPT-2 355M": GPT2_355M,
}
"""Tensor lists of the update benchmark."""


def shapes(config: Model) -> Shapes:
    """All parameters of the model."""
    if isinstance(config, ResNet):
        return resnet(config)
    return vit(config) if isinstance(config, ViT) else gpt2(config)


def tiny(config: Model) -> Model:
    """The same model so small that a step takes next to nothing: for trying out the benchmark itself."""
    if isinstance(config, ResNet):
        return replace(config, blocks=(1, 1, 1, 1), width=4, classes=5, image=32)
    if isinstance(config, ViT):
        return replace(config, layers=1, width=16, mlp=24, heads=2, image=32, classes=5)
    return replace(config, layers=1, width=16, heads=2, vocabulary=40, context=8)


def build_resnet(config: ResNet) -> Any:
    """A torch.nn.Module: (batch, 3, image, image) -> (batch, classes)."""
    import torch
    from torch import nn

    def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)
        )

    class Block(nn.Module):
        def __init__(self, inputs: int, inner: int, outer: int, stride: int, shortcut: bool) -> None:
            super().__init__()
            if config.bottleneck:
                layers = [
                    convolution(inputs, inner, 1),
                    convolution(inner, inner, 3, stride),
                    convolution(inner, outer, 1),
                ]
            else:
                layers = [convolution(inputs, inner, 3, stride), convolution(inner, outer, 3)]
            self.layers = nn.ModuleList(layers)
            self.shortcut = convolution(inputs, outer, 1, stride) if shortcut else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x
            for i, layer in enumerate(self.layers):
                y = layer(y if i == 0 else torch.relu(y))
            return torch.relu(y + self.shortcut(x))

    inputs = config.width
    stages: list[nn.Module] = [
        convolution(3, inputs, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1),
    ]  # fmt: skip
    for stage, blocks in enumerate(config.blocks):
        inner = config.width * 2**stage
        outer = 4 * inner if config.bottleneck else inner
        for block in range(blocks):
            first = block == 0
            stride = 2 if first and stage > 0 else 1
            stages.append(Block(inputs, inner, outer, stride, first and (stage > 0 or inputs != outer)))
            inputs = outer
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, config.classes))


def _transformer_block(width: int, mlp: int, heads: int, causal: bool) -> Any:
    """Attention and MLP, each behind a normalisation and around a residual connection: (batch, tokens, width)."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1 = nn.LayerNorm(width)
            self.qkv = nn.Linear(width, 3 * width)
            self.out = nn.Linear(width, width)
            self.norm2 = nn.LayerNorm(width)
            self.up = nn.Linear(width, mlp)
            self.down = nn.Linear(mlp, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, tokens, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
            x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
            gelu = functional.gelu(self.up(self.norm2(x)), approximate="tanh" if causal else "none")
            return x + self.down(gelu)

    return Block()


def build_vit(config: ViT) -> Any:
    """A torch.nn.Module: (batch, 3, image, image) -> (batch, classes)."""
    import torch
    from torch import nn

    width = config.width

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, width))
            tokens = (config.image // config.patch) ** 2 + 1
            self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
            self.patches = nn.Conv2d(3, width, config.patch, stride=config.patch)
            self.blocks = nn.Sequential(
                *(_transformer_block(width, config.mlp, config.heads, False) for _ in range(config.layers))
            )
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, config.classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.patches(x).flatten(2).transpose(1, 2)
            y = torch.cat([self.token.expand(len(y), -1, -1), y], 1) + self.positions
            return self.head(self.norm(self.blocks(y))[:, 0])

    return Model()


def build_gpt2(config: GPT2) -> Any:
    """A torch.nn.Module: (batch, tokens) int64 -> (batch, tokens, vocabulary)."""
    import torch
    from torch import nn
    from torch.nn import functional

    width = config.width

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(config.vocabulary, width)
            self.positions = nn.Embedding(config.context, width)
            self.blocks = nn.Sequential(
                *(_transformer_block(width, 4 * width, config.heads, True) for _ in range(config.layers))
            )
            self.norm = nn.LayerNorm(width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.blocks(self.tokens(x) + self.positions.weight[: x.shape[1]])
            return functional.linear(self.norm(y), self.tokens.weight)

    return Model()


def build(config: Model) -> Any:
    """The model as a torch.nn.Module, with random parameters of `shapes`."""
    if isinstance(config, ResNet):
        return build_resnet(config)
    return build_vit(config) if isinstance(config, ViT) else build_gpt2(config)
