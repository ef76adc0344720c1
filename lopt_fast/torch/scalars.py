"""Numbers of a step: learning rates, weight decays, gradient scale. What lies on a device is read there, by kernels, so
that the host does not wait for it; only what runs on the host (CPU kernels, the reference) has it read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from ..reference import CLIP_EPSILON

Groups: TypeAlias = list[dict[str, Any]]
Number: TypeAlias = float | torch.Tensor
"""A float, or a tensor of one element on a device."""

HOST = {"cpu"}
"""Types of devices whose memory the host reads without waiting."""


def on_host(value: Any) -> bool:
    """Whether a number can be read without waiting for a device."""
    return not isinstance(value, torch.Tensor) or value.device.type in HOST


def hyperparameters(groups: Groups, read_devices: bool) -> tuple[list[Number], list[Number]]:
    """lr and weight_decay of every group; tensors on a device stay what they are unless `read_devices`.

    Raises ValueError unless each is one number, and finite and not negative where it has been read.
    """
    lrs = [_hyperparameter(group, i, "lr", read_devices) for i, group in enumerate(groups)]
    return lrs, [_hyperparameter(group, i, "weight_decay", read_devices) for i, group in enumerate(groups)]


def _hyperparameter(group: dict[str, Any], index: int, key: str, read_devices: bool) -> Number:
    if key not in group:
        raise ValueError(f"parameter group {index} has no {key!r}: was it saved by another optimizer?")
    value = group[key]
    if not read_devices and not on_host(value):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(
                f"{key} of parameter group {index}: must be one number, not {value.dtype}{tuple(value.shape)}"
            )
        return value
    number = number_of(value)
    if number is None:
        raise ValueError(f"{key}={value!r} of parameter group {index}: must be one number")
    if not 0.0 <= number < math.inf:
        raise ValueError(f"{key}={number} of parameter group {index}: must be finite and not negative")
    return number


def number_of(value: Any) -> float | None:
    """`value` as a float; None unless it is one real number. Text is none, whatever float() makes of it."""
    if isinstance(value, (str, bytes)):
        return None
    if isinstance(value, torch.Tensor) and (value.is_complex() or value.layout != torch.strided):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def check_norm(max_grad_norm: Any) -> None:
    """Raise ValueError unless it is positive and finite, or None."""
    if max_grad_norm is None:
        return
    number = number_of(max_grad_norm)
    if number is None or not 0.0 < number < math.inf:
        raise ValueError(f"max_grad_norm={max_grad_norm!r}: must be positive and finite, or None")


def moved(value: Number, device: torch.device) -> Number:
    """A tensor as one on `device`."""
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def clip_factor(
    gradients: Sequence[torch.Tensor],
    grad_scale: Number,
    max_grad_norm: float,
    more_squares: float = 0.0,
) -> Number:
    """min(1, max_grad_norm / (norm + 1e-6)) of the norm of all gradients together, NaN if that is NaN.

    more_squares: sum of the squares of further gradients.
    Gradients may lie on several devices. Where one is not on the host the result is a tensor, on the device of the
    first of these, and the host does not wait for it.
    """
    squares: dict[torch.device, list[torch.Tensor]] = {}
    for g in gradients:
        norm = torch.linalg.vector_norm(g.detach(), dtype=torch.float64)
        squares.setdefault(g.device, []).append(norm * norm)
    sums = [torch.stack(values).sum() for values in squares.values()]
    elsewhere = [s for s in sums if not on_host(s)]
    if not elsewhere and on_host(grad_scale):
        norm = abs(float(grad_scale)) * math.sqrt(more_squares + sum(s.item() for s in sums))
        factor = max_grad_norm / (norm + CLIP_EPSILON)
        return 1.0 if factor >= 1.0 else factor
    device = elsewhere[0].device if elsewhere else grad_scale.device  # type: ignore[union-attr]
    total = (torch.stack([s.to(device, non_blocking=True) for s in sums]).sum() + more_squares).sqrt()
    quotient = max_grad_norm / (total * abs(moved(grad_scale, device)) + CLIP_EPSILON)
    return torch.where(quotient >= 1.0, torch.ones_like(quotient), quotient)
