"""A second moment that one huge gradient has frozen is found, and no other is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard.analysis import frozen_moments


def after(tx: Any, sizes: Any, params: Any = None) -> Any:
    """The state after gradients of these sizes in `w`, and noise of size 1 in `b`."""
    params = {"b": jnp.zeros(3), "w": jnp.zeros(2)} if params is None else params

    @jax.jit
    def run(sizes: Any, noise: Any) -> Any:
        def step(state: Any, x: Any) -> Any:
            size, b = x
            grads = {"b": b, "w": jnp.full(2, size)}
            return tx.update(grads, state, params)[1], None

        return jax.lax.scan(step, tx.init(params), (sizes, noise))[0]

    rng = np.random.default_rng(0)
    noise = rng.normal(size=(len(sizes), 3)).astype("f4")
    return run(jnp.asarray(sizes, jnp.float32), noise)


HUGE = [1.0] * 50 + [1e10] + [1.0] * 400


@pytest.mark.parametrize(
    "inner", [optax.adam(0.1), optax.amsgrad(0.1), optax.lamb(0.1)]
)
def test_leaf_that_one_gradient_froze_is_named(inner):
    (found,) = frozen_moments(after(og.guard(inner), HUGE))
    assert found.leaf == "w"
    # By hand: 1e10 squared enters with a weight of 1 - 0.999, and decays for 400 steps.
    root = 1e10 * (0.001 * 0.999**400) ** 0.5
    np.testing.assert_allclose(found.root, root, rtol=1e-3)
    np.testing.assert_allclose(found.largest_norm, 2**0.5 * 1e10, rtol=1e-5)
    assert 1 < found.norm < 10
    assert "second moment of w is frozen" in str(found)


def unused(size: float) -> list[float]:
    return [size] * 50 + [0.0] * 400


NOT_FROZEN = {
    "nothing huge": (optax.adam(0.1), [1.0] * 50),
    "not yet a step": (optax.adam(0.1), []),
    "long ago": (optax.rmsprop(0.1), HUGE),  # Its decay is 0.9, so it has forgotten.
    "a leaf that is not used now": (optax.adam(0.1), unused(10.0)),
    "gradients that fall": (optax.adam(0.1), np.geomspace(1e3, 1.0, 1000)),
    "gradients scaled up inside": (optax.chain(optax.scale(1e8), optax.adam(0.1)), [1]),
    "no second moment": (optax.sgd(0.1), HUGE),
}


@pytest.mark.parametrize("name", NOT_FROZEN)
def test_what_moves_is_not_called_frozen(name):
    inner, sizes = NOT_FROZEN[name]
    assert frozen_moments(after(og.guard(inner), sizes)) == []


def test_clip_keeps_the_moments_from_freezing():
    assert frozen_moments(after(og.guard(optax.adam(0.1), clip=1.0), HUGE)) == []


def test_state_without_norms_is_refused():
    with pytest.raises(ValueError, match="`opt_state` holds no norms"):
        frozen_moments(optax.adam(0.1).init(jnp.zeros(2)))
