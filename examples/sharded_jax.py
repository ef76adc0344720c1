"""Sharded parameters under `jax.jit`: each device holds a part of the weights, and of their optimizer state.

XLA_FLAGS=--xla_force_host_platform_device_count=2 python examples/sharded_jax.py
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lopt_fast.jax as lopt

mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
cut = {"w0": P(None, "model"), "b0": P("model"), "w1": P("model", None), "b1": P()}

keys = jax.random.split(jax.random.key(0), 3)
x = jax.random.normal(keys[0], (512, 64))
y = jnp.sin(x).sum(axis=1, keepdims=True)
params = {
    "w0": jax.random.normal(keys[1], (64, 2048)) / 64**0.5, "b0": jnp.zeros(2048),
    "w1": jax.random.normal(keys[2], (2048, 1)) / 2048**0.5, "b1": jnp.zeros(1),
}  # fmt: skip
params = {name: jax.device_put(a, NamedSharding(mesh, cut[name])) for name, a in params.items()}

tx = lopt.learned_optimizer()
state = tx.init(params)  # <-- outside of jit: sharded as the parameters are


def loss_fn(params):
    hidden = jax.nn.relu(x @ params["w0"] + params["b0"])
    return jnp.mean((hidden @ params["w1"] + params["b1"] - y) ** 2)


def train_step(params, state):
    loss, grads = jax.value_and_grad(loss_fn)(params)
    params, state = tx.step(grads, state, params)
    return params, state, loss


train_step = jax.jit(train_step, donate_argnums=(0, 1))
for step in range(200):
    params, state, loss = train_step(params, state)
    loss.block_until_ready()  # devices of a CPU share threads, and steps that overlap may wait for each other for ever
    if step % 50 == 49:
        print(f"step {step + 1}: loss {loss:.4f}")
print("w0", params["w0"].sharding.spec, "its state", state.moments["w0"].sharding.spec)
