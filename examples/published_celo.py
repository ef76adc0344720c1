"""Train with Celo's published weights: a perceptron 64-32-10 on grey CIFAR-10 at 8x8, in PyTorch and in JAX.

    lopt-fast convert theta.state -o celo.safetensors --set train_phase=2   # or: weights.npz
    python examples/published_celo.py celo.safetensors CIFAR10_FOLDER

Prints the mean training loss over all steps and over the last 5%, for Celo and for Adam. Both frameworks begin with the
same parameters and see the same batches. The folder may hold a part of CIFAR-10: the figures in the README are of the
first two files, 20,000 images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from lopt_fast.data import average_pool, grey, load_cifar10

STEPS, BATCH, SIZES = 2000, 128, (64, 32, 10)
ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def load(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """(images (n, 64), labels (n,)); every pixel has mean 0 and standard deviation 1."""
    data = load_cifar10(folder)
    x = average_pool(grey(data.images), 8).reshape(len(data.images), -1)
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32), data.labels


def parameters(rng: np.random.Generator) -> list[np.ndarray]:
    """w, b, w, b: uniform within 1 / sqrt(inputs)."""
    found = []
    for n_in, n_out in pairwise(SIZES):
        bound = 1.0 / np.sqrt(n_in)
        found += [rng.uniform(-bound, bound, shape).astype(np.float32) for shape in ((n_in, n_out), (n_out,))]
    return found


def batches(n: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Indices; every image once before any comes again."""
    while True:
        order = rng.permutation(n)
        yield from order[: n // BATCH * BATCH].reshape(-1, BATCH)


def train_torch(make: Callable[[list[Any]], Any], x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """(STEPS,) losses. make: parameters -> a torch.optim.Optimizer."""
    import torch

    rng = np.random.default_rng(seed)
    w0, b0, w1, b1 = params = [torch.nn.Parameter(torch.from_numpy(p)) for p in parameters(rng)]
    optimizer = make(params)
    images, labels = torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))
    losses = []
    for _, chosen in zip(range(STEPS), batches(len(x), rng), strict=False):
        optimizer.zero_grad()
        logits = torch.relu(images[chosen] @ w0 + b0) @ w1 + b1
        loss = torch.nn.functional.cross_entropy(logits, labels[chosen])
        loss.backward()
        optimizer.step(loss=loss) if hasattr(optimizer, "checkpoint") else optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def train_jax(tx: Any, x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """(STEPS,) losses. tx: an optax transformation."""
    import jax
    import optax

    rng = np.random.default_rng(seed)
    params: Any = parameters(rng)
    state = tx.init(params)

    def loss_of(params: Any, images: Any, labels: Any) -> Any:
        w0, b0, w1, b1 = params
        logits = jax.nn.relu(images @ w0 + b0) @ w1 + b1
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params: Any, state: Any, images: Any, labels: Any) -> tuple[Any, Any, Any]:
        loss, grads = jax.value_and_grad(loss_of)(params, images, labels)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _, chosen in zip(range(STEPS), batches(len(x), rng), strict=False):
        params, state, loss = step(params, state, x[chosen], y[chosen])
        losses.append(float(loss))
    return np.array(losses)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("cifar10")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    import torch

    from lopt_fast.jax import learned_optimizer
    from lopt_fast.torch import LearnedOptimizer

    torch.manual_seed(0)
    x, y = load(options.cifar10)
    tx = learned_optimizer(options.checkpoint, num_steps=STEPS)
    contenders: dict[str, Callable[[int], np.ndarray]] = {
        "Celo, PyTorch": lambda seed: train_torch(
            lambda params: LearnedOptimizer(params, options.checkpoint, num_steps=STEPS), x, y, seed
        ),
        "Celo, JAX": lambda seed: train_jax(tx, x, y, seed),
    }
    for rate in ADAM_RATES:
        contenders[f"Adam, lr {rate:g}"] = lambda seed, rate=rate: train_torch(
            lambda params: torch.optim.Adam(params, rate), x, y, seed
        )
    print(f"{len(x)} images, {STEPS} steps, {options.seeds} seeds\n\n{'':16} mean loss    last 5%")
    for name, train in contenders.items():
        losses = np.stack([train(seed) for seed in range(options.seeds)])
        print(f"{name:16} {losses.mean():9.3f}  {losses[:, -STEPS // 20 :].mean():9.3f}")


if __name__ == "__main__":
    main()
