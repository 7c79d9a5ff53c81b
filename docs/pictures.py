"""Draws the pictures of the pages from a run: `python docs/pictures.py`.

A perceptron of digits that overfits. Batch 60 has a NaN, batch 130 is far too large,
batch 190 has an infinity.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from optax_guard import analysis, plotting
from optax_guard.__main__ import main as command_line
from optax_guard.flax import TrainState
from optax_guard.loops import FitResult, fit

FOLDER = Path(__file__).parent / "pictures"
FAULTS = {60: np.nan, 130: 1e6, 190: np.inf}


def train() -> FitResult:
    """The run."""
    digits = np.load(Path(__file__).parents[1] / "benchmarks" / "digits.npz")
    images, labels = (jnp.asarray(digits[name]) for name in ("images", "labels"))
    images = images.reshape(len(images), -1).astype(jnp.float32) / images.max()
    train_images, train_labels = images[:200], labels[:200]

    def loss_of(params, x, y):
        hidden = jnp.tanh(x @ params["hidden"])
        logits = hidden @ params["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def train_step(state, batch):
        rows, fault = batch
        x, y = train_images[rows] * fault, train_labels[rows]
        loss, grads = jax.value_and_grad(loss_of)(state.params, x, y)
        grads = jax.tree.map(lambda g: g * fault, grads)
        return state.apply_gradients(grads=grads, value=loss), {"loss": loss}

    def batches(step):
        rows = np.random.default_rng(step).integers(len(train_labels), size=32)
        return rows, np.float32(FAULTS.get(step, 1.0))

    keys = jax.random.split(jax.random.key(0))
    width = images.shape[1]
    params = {
        "hidden": jax.random.normal(keys[0], (width, 64)) / width**0.5,
        "out": jax.random.normal(keys[1], (64, 10)) / 8,
    }
    tx = og.guard(optax.adam(1e-2), clip=1.0)
    return fit(
        TrainState.create(apply_fn=loss_of, params=params, tx=tx),
        train_step,
        batches,
        num_steps=600,
        eval_every=5,
        evaluate=jax.jit(
            lambda state: loss_of(state.params, images[200:], labels[200:])
        ),
        stopper=og.early_stopping(og.stop.patience(20)),
    )


def draw_report(history: list[dict[str, float]]) -> None:
    """The page of `optax-guard report --html`, as Chromium shows it, if it is there."""
    if not (browser := shutil.which("chromium") or shutil.which("google-chrome")):
        print("chromium is not in the PATH: pictures/report.png stays as it is")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "digits", "history.jsonl")
        record = analysis.History(path)
        for row in history:
            record.append(int(row["step"]), row)
        command_line(["report", str(path), "--html"])
        options = "--headless --no-sandbox --hide-scrollbars --window-size=1000,1072"
        shot = f"--screenshot={FOLDER / 'report.png'}"
        page = next(Path(folder).rglob("*.html")).as_uri()
        subprocess.run([browser, *options.split(), shot, page], check=True)


def main() -> None:
    """Draws three pictures, and one of a report."""
    result = train()
    history, stop = result.history, result.stop
    skipped = og.skipped_steps(result.state)
    figures = {
        "run": plotting.plot_history(
            history,
            findings=analysis.diagnose(history),
            skipped_steps=skipped,
            stop=stop,
        ),
        "stop": plotting.plot_early_stopping(history, stop=stop),
        "norms": plotting.plot_norm_distribution(history),
    }
    for name, figure in figures.items():
        figure.set_size_inches(8.3, figure.get_size_inches()[1] * 0.9)
        figure.savefig(FOLDER / f"{name}.png", dpi=100)
    draw_report(history)


if __name__ == "__main__":
    main()
