"""The built-in tasks in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..torch import LearnedOptimizer
from .choices import Choice
from .problems import ImageProblem, Problem, QuadraticProblem, TextProblem

Batch = Any


class TorchTrainer:
    """Implements `loop.Trainer`. `steps` is the length of the training."""

    def __init__(self, problem: Problem, choice: Choice, seed: int, batch_size: int, steps: int) -> None:
        torch.manual_seed(seed)
        self._model, self._loss = _model(problem)
        self._problem, self._seed, self._batch_size = problem, seed, batch_size
        self._params = list(self._model.parameters())
        self._optimizer = _optimizer(choice, self._params, steps)
        self.parameters = sum(p.numel() for p in self._params)

    def gradient(self, step: int) -> float:
        arrays = self._problem.batch(np.random.default_rng((self._seed, step)), self._batch_size)
        batch = [torch.from_numpy(a) for a in arrays]
        self._optimizer.zero_grad()
        loss = self._loss(*batch)
        loss.backward()
        self._current = loss.detach()
        return float(self._current)

    def update(self) -> None:
        if isinstance(self._optimizer, LearnedOptimizer):
            self._optimizer.step(loss=self._current)
        else:
            self._optimizer.step()

    def state_bytes(self) -> int:
        shared = [group.get("shared", {}) for group in self._optimizer.param_groups]  # of a LearnedOptimizer
        state = [*self._optimizer.state.values(), *shared]
        return sum(v.numel() * v.element_size() for s in state for v in s.values() if torch.is_tensor(v))


def _optimizer(choice: Choice, params: list[nn.Parameter], steps: int) -> torch.optim.Optimizer:
    if choice.checkpoint is not None:
        return LearnedOptimizer(
            params, choice.checkpoint, choice.lr, choice.weight_decay,
            statistics=choice.statistics, num_steps=steps,
        )  # fmt: skip
    if choice.name == "adamw":
        return torch.optim.AdamW(params, lr=choice.lr, weight_decay=choice.weight_decay, fused=True)
    return torch.optim.SGD(params, lr=choice.lr, momentum=0.9, weight_decay=choice.weight_decay, fused=True)


def _model(problem: Problem) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    """The network and its loss as a function of a batch."""
    if isinstance(problem, QuadraticProblem):
        quadratic = Quadratic(problem)
        return quadratic, quadratic.forward
    if isinstance(problem, TextProblem):
        transformer = ByteTransformer(problem.width, problem.layers, problem.heads, problem.context)

        def next_byte(tokens: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(transformer(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

        return transformer, next_byte
    network = convolutions(problem) if problem.convolutions else perceptron(problem)
    return network, lambda x, y: F.cross_entropy(network(x), y)


def perceptron(problem: ImageProblem) -> nn.Module:
    sizes = (problem.images[0].size, *problem.hidden, 10)
    layers: list[nn.Module] = [nn.Flatten()]
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutions(problem: ImageProblem) -> nn.Module:
    """3x3 convolutions of stride 2 with ReLU, the mean over positions, a linear layer; images channels last."""
    channels = (problem.images.shape[-1], *problem.hidden)
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(channels):
        layers += [nn.Conv2d(n_in, n_out, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(
        Permute(0, 3, 1, 2), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10)
    )


class Permute(nn.Module):
    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes: Sequence[int] = axes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(*self.axes)


class Quadratic(nn.Module):
    """0.5 * sum(h (p - target)^2) over a matrix and a vector."""

    def __init__(self, problem: QuadraticProblem) -> None:
        super().__init__()
        self.p = nn.ParameterList([torch.zeros(t.shape) for t in problem.targets])
        self._h = [torch.from_numpy(h) for h in problem.curvatures]
        self._target = [torch.from_numpy(t) for t in problem.targets]

    def forward(self) -> torch.Tensor:
        terms = zip(self.p, self._h, self._target, strict=True)
        return torch.stack([0.5 * (h * (p - t) ** 2).sum() for p, h, t in terms]).sum()


class Block(nn.Module):
    """Pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ByteTransformer(nn.Module):
    """Causal transformer over bytes with learned positions: (n, t) int64 -> (n, t, 256) logits."""

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 256)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        logits: torch.Tensor = self.out(self.norm(self.blocks(x)))
        return logits
