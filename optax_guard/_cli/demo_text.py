"""The text of the demo, in characters: its training and validation parts, samples."""

import dataclasses
import pydoc_data.topics
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Characters to train on. With more of them the network still learns when the demo
# should be over. With half of them it learns the text by heart, and writes worse.
_TRAINING_SIZE = 160_000
_VALIDATION_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Text:
    """A text in numbers.

    Attributes:
      characters: The vocabulary, sorted.
      train: Indices into the vocabulary of the first part of the text.
      validation: Indices of the last tenth.
    """

    characters: str
    train: np.ndarray
    validation: np.ndarray

    def windows(
        self, part: np.ndarray, starts: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """One-hot inputs [window, time, vocabulary] and the characters that follow."""
        indices = part[starts[:, None] + np.arange(length + 1)]
        vocabulary = np.eye(len(self.characters), dtype=np.float32)
        return vocabulary[indices[:, :-1]], indices[:, 1:]

    def batch(
        self, seed: int, step: int, size: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The training batch of a step; the same seed gives the same batch."""
        random = np.random.default_rng((seed, step))
        starts = random.integers(0, len(self.train) - length, size)
        return self.windows(self.train, starts, length)

    def held_out(self, size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows spread evenly over the validation text."""
        last = len(self.validation) - length - 1
        starts = np.linspace(0, last, size).astype(int)
        return self.windows(self.validation, starts, length)


def load_text() -> Text:
    """The documentation that Python's own `help` shows, in ASCII.

    Indents and the lines of tables are shortened to one character. A network would
    otherwise write little else.
    """
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    text = text.encode("ascii", "ignore").decode()
    text = re.sub(r"([ *-])\1+", r"\1", text)
    characters = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(characters)}
    indices = np.array([number[character] for character in text], np.int32)
    split = int(len(indices) * (1 - _VALIDATION_SHARE))
    return Text(characters, indices[:split][:_TRAINING_SIZE], indices[split:])


def sample(
    text: Text,
    predict: Callable[[jax.Array], jax.Array],
    *,
    window: int,
    length: int,
    seed: int,
    temperature: float = 0.5,
) -> str:
    """Continues the validation text from the end of a paragraph.

    Args:
      text: The text.
      predict: Logits [1, time, vocabulary] of one-hot characters of that shape.
      window: Characters from which the next one is predicted.
      length: Characters to write.
      seed: Seed of the choices.
      temperature: 1 draws from the prediction as it is; less prefers likely characters.

    Returns:
      The new characters, without those before them.
    """
    joined = "".join(text.characters[i] for i in text.validation)
    end = joined.find(".\n\n", window) + 3
    prompt = jnp.asarray(text.validation[end - window : end])

    def write(recent: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs = jax.nn.one_hot(recent[None], len(text.characters))
        logits = predict(inputs)[0, -1]
        chosen = jax.random.categorical(key, logits / temperature)
        return jnp.append(recent[1:], chosen.astype(recent.dtype)), chosen

    keys = jax.random.split(jax.random.key(seed), length)
    _, written = jax.jit(lambda: jax.lax.scan(write, prompt, keys))()
    return "".join(text.characters[i] for i in np.asarray(written))
