"""Iterators with a state, Grain's among them: a cut run goes on with its data."""

import json
from typing import Any

import grain
import numpy as np
import pytest

from optax_guard.loops._source import as_json, from_json
from tests.test_checkpoints import run


class Stream:
    """Random batches, as an iterator with a state of many kinds."""

    def __init__(self):
        self.random = np.random.default_rng(7)
        self.drawn = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.drawn += 1
        return self.random.normal(size=2).astype(np.float32)

    def get_state(self):
        return {"random": self.random.bit_generator.state, "drawn": bytes([self.drawn])}

    def set_state(self, state):
        self.random.bit_generator.state = state["random"]
        [self.drawn] = state["drawn"]


ROWS: Any = np.random.default_rng(7).normal(size=(30, 2)).astype(np.float32)


class Jitter(grain.transforms.RandomMap):
    """Grain gives its generator a state too."""

    def random_map(self, element, rng):
        return element + rng.normal(size=2).astype(np.float32)


def grain_dataset():
    rows = grain.MapDataset.source(ROWS).seed(5).shuffle().repeat()
    return rows.to_iter_dataset().filter(lambda x: x[0] > 0).random_map(Jitter())


def grain_loader():
    sampler = grain.samplers.IndexSampler(num_records=30, shuffle=True, seed=5)
    return grain.DataLoader(data_source=ROWS, sampler=sampler, operations=[Jitter()])


class Crashing:
    """Five batches of another source, and then an error."""

    def __init__(self, source):
        self.inner, self.left = iter(source), 5
        self.get_state, self.set_state = self.inner.get_state, self.inner.set_state

    def __iter__(self):
        return self

    def __next__(self):
        self.left -= 1
        if self.left < 0:
            raise OSError("disk on fire")
        return next(self.inner)


@pytest.mark.parametrize("source", [Stream, grain_dataset, grain_loader])
def test_iterator_with_a_state_goes_on_bit_for_bit(tmp_path, source):
    expected = run(tmp_path / "whole", data=source())
    with pytest.raises(OSError, match="disk on fire"):
        run(tmp_path / "cut", data=Crashing(source()))
    found = run(tmp_path / "cut", data=source())
    assert found.history == expected.history
    np.testing.assert_array_equal(found.state.params["w"], expected.state.params["w"])


def test_state_of_an_iterator_is_the_same_after_json():
    state = {
        "numbers": [1, 2.5, None, True, 2**100, np.int64(3)],
        "text": ("a", b"\x00\xff"),
        "array": np.arange(6, dtype=">i2").reshape(2, 3),
    }
    found = from_json(json.loads(json.dumps(as_json(state))))
    assert found["numbers"] == state["numbers"]
    assert found["text"] == state["text"]
    assert found["array"].dtype == np.dtype(">i2")
    np.testing.assert_array_equal(found["array"], state["array"])
    with pytest.raises(TypeError, match=r"`get_state\(\)` of `batches` must .* `set`"):
        as_json({"items": {1, 2}})


def test_checkpoint_without_the_state_of_the_iterator_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="holds the states of 0, and 1 processes run"):
        run(tmp_path, 10, data=Stream())
