"""Learned optimizers for PyTorch, used like those of `torch.optim`.

from lopt_fast.torch import LearnedOptimizer

optimizer = LearnedOptimizer(model.parameters())
"""

from .optimizer import LearnedOptimizer

__all__ = ["LearnedOptimizer"]
