"""A learned optimizer in place of `torch.optim.AdamW`: the marked line is all that changes."""

import torch

from lopt_fast.torch import LearnedOptimizer

torch.manual_seed(0)
x = torch.randn(512, 8)
y = x.sin().sum(dim=1, keepdim=True)
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))

optimizer = LearnedOptimizer(model.parameters())  # <-- no learning rate to tune

for step in range(500):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    if step % 100 == 99:
        print(f"step {step + 1}: loss {loss.item():.4f}")
