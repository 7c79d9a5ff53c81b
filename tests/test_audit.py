"""Audits of a run for silent data corruption, with devices that make mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

from optax_guard.flax import TrainState, fit
from optax_guard.loops._audit import _checksums

TX = optax.sgd(0.1)


class Device:
    """Computes ``w - x``, and flips a bit of it at some of its calls."""

    def __init__(self, wrong=(), noise=None):
        self.calls, self.wrong, self.noise = 0, wrong, noise

    def compute(self, w, x):
        found = np.array(w - x, np.float32)
        if self.calls in self.wrong:
            found.view(np.uint32)[1] ^= 1 << 20
        if self.noise is not None:
            found += self.noise.normal(size=2).astype(np.float32) * 1e-6
        self.calls += 1
        return found


# The device at hand: the step is one function, and so compiled once.
devices = [Device()]


def step(state, x):
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    grad = io_callback(lambda w, x: devices[0].compute(w, x), shape, state.params, x)
    return state.apply_gradients(grads=grad), jnp.sum(grad**2)


def run(device, audit_every):
    devices[0] = device
    return fit(
        TrainState.create(apply_fn=str, params=jnp.array([1.0, -1.0]), tx=TX),
        step,
        lambda step: np.full(2, step / 8, np.float32),
        num_steps=6,
        eval_every=3,
        audit_every=audit_every,
    )


def test_audit_changes_nothing_and_repeats_one_step_in_so_many():
    plain, audited = Device(), Device()
    expected, found = run(plain, None), run(audited, 2)
    assert found.history == expected.history
    np.testing.assert_array_equal(found.state.params, expected.state.params)
    assert (plain.calls, audited.calls) == (6, 9)


# Steps 0 and 2 are taken twice, as calls 0 and 1, 3 and 4; step 1 is call 2.
@pytest.mark.parametrize("wrong", [3, 4])
def test_flipped_bit_in_an_audited_step_is_an_error_that_names_step_and_array(wrong):
    with pytest.raises(RuntimeError, match=r"at step 2: of 4 .*params") as e:
        run(Device(wrong=[wrong]), 2)
    assert "cpu:0" in str(e.value).lower().replace("_", ":")


def test_step_that_is_not_deterministic_is_said_once_and_is_no_error():
    device = Device(noise=np.random.default_rng(0))
    with pytest.warns(UserWarning, match="audits no more: at step 0 .* 4 in 4") as told:
        assert run(device, 1).state.step == 6
    assert len(told) == 1
    assert told[0].filename == __file__
    # Four trials and the step itself, and five without an audit.
    assert device.calls == 10


def test_every_flip_of_a_bit_changes_the_checksum():
    random = np.random.default_rng(0)
    for dtype in (
        np.float32,
        np.float16,
        jnp.bfloat16,
        np.int8,
        np.uint32,
        np.complex64,
    ):
        x = random.integers(0, 256, 64, np.uint8).view(dtype)
        changed = []
        for bit in random.integers(0, 512, 8):
            flipped = np.array(x).view(np.uint8)
            flipped[bit // 8] ^= 1 << bit % 8
            changed.append(jnp.asarray(flipped.view(dtype)))
        before = _checksums([jnp.asarray(x)] * len(changed))
        assert all(a != b for a, b in zip(_checksums(changed), before, strict=True))
    key = jax.random.key(0)
    assert _checksums({"key": key, "no": jnp.array([True, False])}) == (0, 1)


def test_number_of_steps_is_checked():
    with pytest.raises(ValueError, match="`audit_every` must be a whole number of at"):
        run(Device(), 0)
