"""Learned optimizers for JAX, as optax gradient transformations.

```python
import lopt_fast.jax as lopt

tx = lopt.learned_optimizer("small_fc_lopt")
state = tx.init(params)
updates, state = tx.update(grads, state, params)  # then optax.apply_updates(params, updates)
params, state = tx.step(grads, state, params)  # or both in one, in place where donated
```
"""

from ..errors import install as _install

try:
    import jax as _jax  # noqa: F401
    import optax as _optax  # noqa: F401
except ImportError as _error:
    raise ImportError(f"lopt_fast.jax needs jax and optax ({_error}): {_install('jax')}") from _error

from .architecture import ArchitectureState
from .state import LearnedOptimizerState
from .transformation import LearnedOptimizer, learned_optimizer

__all__ = ["ArchitectureState", "LearnedOptimizer", "LearnedOptimizerState", "learned_optimizer"]
