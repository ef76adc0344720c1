"""Parameters that are DTensors of torch.distributed.tensor: which part of one lies in this process, and how its state
lies over all of them.

torch.distributed.tensor takes long to import, and `import lopt_fast.torch` does not: see `is_dtensor`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch

from ..backends import BackendError, refusal
from ..layout import Part, memory_order
from ..native import Placement
from ..spec import Spec
from .scalars import Groups

_LIKE_PARAMETER = ("momentum", "second_moment")
"""Entries of state that are cut as the parameter is. Below rank 2 factored_row is another one."""

_OTHER_WAYS = "or train with torch.nn.parallel.DistributedDataParallel, which leaves parameters whole"


def is_dtensor(value: Any) -> bool:
    """Whether it is a DTensor; there is none before their module has been imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local(tensor: Any) -> torch.Tensor:
    """This process's part of a DTensor. (What `to_local` gives, but for the view that it makes, which takes longer than
    all that a step asks here.)"""
    found: torch.Tensor = tensor._local_tensor
    if type(found) is not torch.Tensor and (wait := getattr(found, "wait", None)) is not None:
        found = wait()  # a collective operation was under way
    return found


def has_memory(tensor: torch.Tensor) -> bool:
    """Or needs none. Fake tensors have none, nor those whose storage was freed."""
    return tensor.numel() == 0 or tensor.data_ptr() != 0


def placement(p: Any) -> Placement:
    """How the part of the DTensor `p` that this process holds lies in memory; axes in the order of the whole tensor's
    strides, so that all processes have the same."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, whole = p.device_mesh, tuple(p.shape)
    shape, begin = compute_local_shape_and_global_offset(whole, mesh, p.placements)
    copies = math.prod(mesh.size(i) for i, kind in enumerate(p.placements) if kind.is_replicate())
    part = Part(tuple(shape), whole, tuple(begin), copies)
    return Placement(part.shape, memory_order(p.stride(), whole), part=part)


# ---- what can be optimized ----


def check_dtensor(spec: Any, backend: str, name: str, p: Any) -> None:
    """Raise ValueError or BackendError, naming the parameter, unless the DTensor `p` can be optimized."""
    if not isinstance(spec, Spec):
        raise BackendError(
            f"{name} is a DTensor: {spec.NAME} cannot update one so far, small_fc_lopt can; take its weights, "
            f"{_OTHER_WAYS}"
        )
    if p.device.type != "cpu":
        raise BackendError(
            f"{name} is a DTensor on {p.device}: only the CPU kernels update DTensors so far; keep it on the CPU "
            f"(fully_shard(..., offload_policy=CPUOffloadPolicy())), {_OTHER_WAYS}"
        )
    if backend not in ("auto", "cpu"):
        raise BackendError(
            f"backend={backend!r}: {name} is a DTensor, which only the CPU kernels update so far; take "
            "backend='auto' or 'cpu'"
        )
    if reason := refusal("cpu", spec, "cpu", str(p.dtype).removeprefix("torch.")):
        raise BackendError(f"{name} is a DTensor, which only the CPU kernels update so far: {reason}")
    if p.device_mesh.get_coordinate() is None:
        raise ValueError(
            f"{name} is a DTensor on a mesh without this process: leave it to the optimizers of the others"
        )
    for i, kind in enumerate(p.placements):
        if not _is_box(p, i):
            raise ValueError(
                f"{name} is a DTensor with placement {kind!r} on mesh dimension {i}: each process must hold one block "
                "of it; make it Shard or Replicate with p.redistribute, or if fully_shard cuts an axis that tensor "
                "parallelism has cut already, have it take another one, with its shard_placement_fn"
            )
    expected, found = placement(p).shape, tuple(local(p).shape)
    if expected != found:
        raise ValueError(
            f"{name} is a DTensor whose part in this process has shape {found}, by its placements {expected}: make it "
            "with distribute_tensor, or give DTensor.from_local the shape of the whole"
        )
    _check_backends(name, p)


def _is_box(p: Any, mesh_dim: int) -> bool:
    """Whether this placement leaves a process one block of the tensor.

    _StridedShard does where fully_shard cuts what tensor parallelism has cut along the same axis, evenly.
    """
    from torch.distributed.tensor import Replicate, Shard

    kind, mesh = p.placements[mesh_dim], p.device_mesh
    if type(kind) in (Shard, Replicate):
        return True
    if type(kind).__name__ != "_StridedShard":
        return False
    same = [i for i, other in enumerate(p.placements) if getattr(other, "dim", None) == kind.dim]
    later = [i for i in same if i > mesh_dim and type(p.placements[i]) is Shard]
    cuts = math.prod(map(mesh.size, same))
    return (
        same == [mesh_dim, *later]
        and bool(kind.split_factor == math.prod(map(mesh.size, later)))
        and p.shape[kind.dim] % cuts == 0
    )


def _check_backends(name: str, p: Any) -> None:
    """Raise ValueError unless the processes of the mesh can add up what lies on the CPU."""
    for group in groups_of(p.device_mesh):
        try:
            group._get_backend(torch.device("cpu"))
        except RuntimeError as error:
            raise ValueError(
                f"{name} is a DTensor on the CPU, but the process group of its mesh has no backend for the CPU: "
                "torch.distributed.init_process_group(backend='cpu:gloo,cuda:nccl')"
            ) from error


def check_dgradient(name: str, p: Any) -> None:
    """Raise ValueError unless the gradient of the DTensor `p` lies where `p` does."""
    g = p.grad
    if not is_dtensor(g):
        raise ValueError(
            f"the gradient of {name} is not a DTensor as the parameter is: "
            "p.grad = distribute_tensor(gradient, p.device_mesh, p.placements)"
        )
    if g.device_mesh != p.device_mesh:
        raise ValueError(
            f"the gradient of {name} is on mesh {g.device_mesh}, the parameter on {p.device_mesh}: "
            "p.grad must be a DTensor on the mesh of p"
        )
    expected, found = tuple(local(p).shape), tuple(local(g).shape)
    if g.placements == p.placements and found != expected:
        raise ValueError(
            f"the part of the gradient of {name} in this process has shape {found}, that of the parameter {expected}: "
            "make it with distribute_tensor, or give DTensor.from_local the shape of the whole"
        )


# ---- state ----


def _whole_layouts(spec: Spec, p: Any) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """(shape, dense strides) of each array of state, of the whole parameter."""
    whole = Placement.of(p.shape, p.stride()).state_layouts(spec)
    return {
        key: (shape, (math.prod(shape[1:]), *strides[1:]) if len(shape) > 1 else strides)
        for key, (shape, strides) in whole.items()
    }


def _state_placements(p: Any, key: str) -> tuple[Any, ...]:
    """Of an entry of the state of `p`: cut as `p` is, whose axes follow that of the decays, or whole everywhere."""
    from torch.distributed.tensor import Replicate, Shard

    def shifted(kind: Any) -> Any:
        if type(kind) is Shard:
            return Shard(kind.dim + 1)
        return kind if kind.is_replicate() else type(kind)(kind.dim + 1, split_factor=kind.split_factor)

    cut = key in _LIKE_PARAMETER or (key == "factored_row" and p.dim() < 2)
    return tuple(shifted(kind) if cut else Replicate() for kind in p.placements)


def as_state(spec: Spec, p: Any, parts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The arrays of state of the DTensor `p` as DTensors, of which this process holds `parts`."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    found = {}
    for key, (shape, strides) in _whole_layouts(spec, p).items():
        part = parts[key]
        meta = TensorMeta(torch.Size(shape), strides, part.dtype)
        lies = DTensorSpec(p.device_mesh, _state_placements(p, key), tensor_meta=meta)
        # Not from_local: that would move the part of an offloaded parameter to the device of the mesh.
        found[key] = DTensor(part, lies, requires_grad=False)
    return found


def parts_of_state(what: str, spec: Spec, p: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """This process's part of each array in `state`: DTensors that lie as `as_state` makes them, or tensors of the
    whole, which are cut.

    Raises ValueError, naming the parameter and the entry, for others.
    """
    found = {}
    for key, (shape, _) in _whole_layouts(spec, p).items():
        value, placements = state[key], _state_placements(p, key)
        if isinstance(value, torch.Tensor) and tuple(value.shape) != shape:
            raise ValueError(
                f"{what}: {key!r} is {tuple(value.shape)}, expected shape {shape}: "
                "load a state that was saved for the same model and weights"
            )
        if not is_dtensor(value):
            is_whole = isinstance(value, torch.Tensor) and value.layout == torch.strided
            found[key] = _cut(value, p, placements) if is_whole else value
            continue
        if value.device_mesh != p.device_mesh or tuple(value.placements) != placements:
            raise ValueError(
                f"{what}: {key!r} lies as {value.placements} on {value.device_mesh}, expected {placements} on "
                f"{p.device_mesh}: load it with torch.distributed.checkpoint, which moves it"
            )
        found[key] = local(value)
    return found


def _cut(value: torch.Tensor, p: Any, placements: tuple[Any, ...]) -> torch.Tensor:
    if all(kind.is_replicate() for kind in placements):
        return value
    part = placement(p).part
    assert part is not None
    box = (slice(begin, begin + n) for begin, n in zip(part.begin, part.shape, strict=True))
    return value[(slice(None), *box)]


# ---- what processes tell each other ----


def groups_of(mesh: Any) -> list[Any]:
    """Process groups along the dimensions of a mesh: a sum over each in turn is one over all its processes."""
    return [mesh.get_group(i) for i in range(mesh.ndim) if mesh.size(i) > 1]


def agreed(groups: Groups, found_inf: Any) -> Any:
    """`found_inf` of a GradScaler; where parameters are DTensors, the largest of all processes of their meshes."""
    meshes = dict.fromkeys(p.device_mesh for group in groups for p in group["params"] if is_dtensor(p))
    if not meshes:
        return found_inf
    largest = torch.tensor([float(found_inf)])
    for mesh in meshes:
        for group in groups_of(mesh):
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
    return largest.item()
