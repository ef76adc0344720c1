"""Fully sharded data parallel training: each process holds a part of every parameter, and of its optimizer state.

torchrun --nproc-per-node 2 examples/sharded_torch.py
"""

import os

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lopt_fast.torch import LearnedOptimizer

mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
rank = distributed.get_rank()

torch.manual_seed(0)  # the same parameters in all processes
model = torch.nn.Sequential(torch.nn.Linear(8, 512), torch.nn.ReLU(), torch.nn.Linear(512, 1))
fully_shard(model, mesh=mesh)

optimizer = LearnedOptimizer(model.parameters())  # <-- after fully_shard

torch.manual_seed(rank + 1)  # each process its own data
x = torch.randn(512, 8)
y = x.sin().sum(dim=1, keepdim=True)

for step in range(200):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    if step % 50 == 49:
        distributed.all_reduce(loss := loss.detach(), distributed.ReduceOp.SUM)
        if rank == 0:
            print(f"step {step + 1}: loss {loss.item() / mesh.size():.4f}")

distributed.destroy_process_group()
