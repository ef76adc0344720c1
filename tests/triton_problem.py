"""A step of the Triton kernels over a few tensors, compared with the reference, on any device.

Every step is compared by itself: the reference takes the parameters and the state that the kernels left before it, so
that storage in 16 bits is held to the rounding of one step.
"""

from __future__ import annotations

import numpy as np
import torch
from helpers import random_problem, random_theta

from lopt_fast import reference
from lopt_fast.native import Placement
from lopt_fast.torch.triton import TritonStep, TritonTensor

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Distance from 1 to the next number. A stored value is off by at most this (the interpreter truncates bfloat16)."""


class Problem:
    """Tensors, their gradients, and a TritonStep over them; `step` takes one step and compares it."""

    def __init__(
        self,
        spec,
        shapes,
        *,
        params=None,
        param_dtype=torch.float32,
        grad_dtype=None,
        state_dtype=torch.float32,
        groups=None,
        clip=None,
        outputs=False,
        seed=0,
        device="cpu",
        started=False,
        **options,
    ):
        """`started`: as if 7 steps had been taken, with state at random."""
        self.spec, self.theta = spec, random_theta(spec, seed)
        self.grad_dtype = grad_dtype or param_dtype
        self.tensors, self.t = [], 0
        for i, shape in enumerate(shapes):
            p = (
                torch.tensor(random_problem(shape, 1, seed + i)[0]).to(device, param_dtype)
                if params is None
                else params[i]
            )
            layouts = Placement.of(p.shape, p.stride()).state_layouts(spec)
            state = {
                name: torch.empty_strided(
                    size,
                    strides,
                    dtype=state_dtype if name in ("momentum", "second_moment") else torch.float32,
                    device=device,
                ).zero_()
                for name, (size, strides) in layouts.items()
            }
            if started:
                self.t = 7
                for name, value in state.items():
                    noise = torch.tensor(random_problem(tuple(value.shape), 1, seed + 100 + i)[0])
                    value.copy_(0.1 * noise if name == "momentum" else noise.square())
            self.tensors.append(
                TritonTensor(
                    name=f"{i} {tuple(p.shape)}",
                    param=p,
                    state=state,
                    step=torch.tensor(self.t, device=device),
                    group=groups[i] if groups else 0,
                    clip=clip[i] if clip else True,
                    output=torch.empty_like(p) if outputs else None,
                )
            )
        gradient = self.grad_dtype if grad_dtype else None
        self.kernel = TritonStep(spec, self.theta, self.tensors, gradient=gradient, **options)

    def gradients(self):
        grads = []
        for i, tensor in enumerate(self.tensors):
            g = random_problem(tuple(tensor.param.shape), 1, 1000 * (self.t + 1) + i)[1][0]
            grads.append(torch.tensor(g).to(self.tensors[i].param.device, self.grad_dtype))
        return grads

    def reference(self, i, g, lr, weight_decay, grad_scale):
        """(update, state) in float64 from what the kernels left."""
        tensor = self.tensors[i]
        empty = np.zeros(0)
        state = {n: a.double().cpu().numpy() for n, a in tensor.state.items()}
        old = reference.TensorState(*(state.get(n, empty) for n in reference.TensorState._fields))
        return reference.update(
            self.spec, self.theta, tensor.param.double().cpu().numpy(), g.double().cpu().numpy(), old, int(tensor.step),
            lr=lr, weight_decay=weight_decay, grad_scale=grad_scale,
        )  # fmt: skip

    def step(self, grads=None, *, lrs=(0.7,), weight_decays=(0.05,), grad_scale=1.0, scale=None, **options):
        """`scale`: what gradients are really multiplied by, one number for each tensor; default: grad_scale."""
        grads = self.gradients() if grads is None else grads
        scales = [grad_scale] * len(grads) if scale is None else scale
        numbers = [float(x) for x in lrs], [float(x) for x in weight_decays]
        expected = [
            self.reference(i, g, numbers[0][t.group], numbers[1][t.group], float(scales[i]))
            for i, (t, g) in enumerate(zip(self.tensors, grads, strict=True))
        ]
        before = [t.param.double().cpu().numpy().copy() for t in self.tensors]
        kept = [g.clone() for g in grads]
        self.kernel.step(grads, lrs=lrs, weight_decays=weight_decays, grad_scale=grad_scale, **options)
        for tensor, g, original, p, (update, state) in zip(
            self.tensors, grads, kept, before, expected, strict=True
        ):
            assert torch.equal(g, original), f"{tensor.name}: the gradient was written"
            self.compare(tensor, p, update, state)
        self.t += 1

    def compare(self, tensor, p, update, state):
        where = f"{tensor.name}, step {self.t}"
        assert int(tensor.step) == self.t + 1, f"{where}: counted {int(tensor.step)} steps"
        if not p.size:
            return
        eps = EPS[tensor.param.dtype]
        bound = 4 * 2.0**-23 * np.abs(p).max() + 1e-4 * np.abs(update).max()
        if tensor.output is None:
            stored = np.abs(p + update).max()
            error = np.abs(tensor.param.double().cpu().numpy() - p - update).max()
        else:
            stored = np.abs(update).max()
            error = np.abs(tensor.output.double().cpu().numpy() - update).max()
            assert np.array_equal(tensor.param.double().cpu().numpy(), p), (
                f"{where}: the parameter was written"
            )
        bound += eps * stored if eps > 1e-6 else 0.0
        assert error <= bound, f"{where}: update off by {error:.3e}, allowed {bound:.3e}"
        for name, found in tensor.state.items():
            wanted = getattr(state, name)
            relative = EPS[found.dtype] if found.dtype == torch.bfloat16 else 1e-4
            error = np.abs(found.double().cpu().numpy() - wanted).max()
            assert error <= relative * np.abs(wanted).max(), f"{where}: {name} off by {error:.3e}"
