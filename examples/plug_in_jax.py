"""A learned optimizer in place of `optax.adamw`: the marked line is all that changes."""

import jax
import jax.numpy as jnp
import optax

import lopt_fast.jax as lopt

keys = jax.random.split(jax.random.key(0), 3)
x = jax.random.normal(keys[0], (512, 8))
y = jnp.sin(x).sum(axis=1, keepdims=True)
params = {
    "w0": jax.random.normal(keys[1], (8, 64)) / 8**0.5, "b0": jnp.zeros(64),
    "w1": jax.random.normal(keys[2], (64, 1)) / 64**0.5, "b1": jnp.zeros(1),
}  # fmt: skip

tx = lopt.learned_optimizer()  # <-- no learning rate to tune


def loss_fn(params):
    hidden = jax.nn.relu(x @ params["w0"] + params["b0"])
    return jnp.mean((hidden @ params["w1"] + params["b1"] - y) ** 2)


@jax.jit
def train_step(params, state):
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


state = tx.init(params)
for step in range(500):
    params, state, loss = train_step(params, state)
    if step % 100 == 99:
        print(f"step {step + 1}: loss {loss:.4f}")
