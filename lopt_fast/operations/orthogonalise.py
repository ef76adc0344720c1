"""What is done to the step of a whole matrix: orthogonalisation, and normalisation to a root mean square of 1.

Plain array code alone: the cost is in matrix products, which every framework has kernels for.
"""

from __future__ import annotations

from ..namespace import array_namespace
from ..reference import Array

COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of K. Jordan et al. 2024 (Muon): steep at 0, and singular values end between about 0.7 and 1.2, not at 1."""


def newton_schulz(
    x: Array,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    iterations: int = 5,
    epsilon: float = 1e-8,
) -> Array:
    """`x`, (..., rows, columns), with singular values near 1 and its singular vectors: U V^T of U S V^T, nearly.

    x / (Frobenius norm + epsilon), then `iterations` times with (a, b, c) the coefficients and A = x x^T

        x <- a x + (b A + c A A) x

    A quintic Newton-Schulz iteration (Bernstein & Newhouse 2024, arXiv 2409.20325, App. A). Rank 2 at least.
    """
    xp = array_namespace(x)
    rows, columns = x.shape[-2:]
    tall = rows > columns
    if tall:  # the smaller of x x^T and x^T x
        x = xp.matrix_transpose(x)
    x = x / (xp.sqrt(xp.sum(x * x, axis=(-2, -1), keepdims=True)) + epsilon)
    a, b, c = coefficients
    for _ in range(iterations):
        product = x @ xp.matrix_transpose(x)
        x = a * x + (b * product + c * (product @ product)) @ x
    return xp.matrix_transpose(x) if tall else x


def unit_rms(x: Array, epsilon: float = 1e-9) -> Array:
    """x / sqrt(mean x^2 + epsilon), the mean over the last two axes, or the only one, or of a scalar itself."""
    xp = array_namespace(x)
    axes = tuple(range(x.ndim))[-2:]
    mean_square = xp.mean(x * x, axis=axes, keepdims=True) if axes else x * x
    return x / xp.sqrt(mean_square + epsilon)
