"""What a bound that needs no tuning should reach in `stability`, and whether it does.

*Healthy slowdown* is how far the median final loss is above the unclipped one, mean
over those cells of model, scale and learning rate in which the unclipped one is within
0.05 nats of the best of the sweep. Goals:

* width: with SGD at least 1.2 times that of the widest of Optax's clips whose healthy
  slowdown is at most 0.04, with Adam 1.3 times;
* mean regret, each at its own best learning rate: at most 0.05 nats, 0.03 with Adam;
* healthy slowdown: at most 0.04 nats (SGD);
* bad batches: with the faults of `bad_batches` and AdamW the largest excursion, median
  of the seeds, is at most 0.01 nats above that of a clip at 1.
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import optax_guard as og
from benchmarks import _text_run
from benchmarks._layers import by_layer
from benchmarks._update_bound import NUMBERS, Scope, bound_update

HEALTHY = 0.05  # Nats above the sweep's best.
SLOWDOWN = 0.04
WIDER = {"SGD": 1.2, "Adam": 1.3}
REGRET = {"SGD": 0.05, "Adam": 0.03}
EXCURSION = 0.01


def _bounded(scope: Scope, layer_axis: Callable[[str], int | None]) -> Any:
    """Of a threshold that it needs not and an optimizer: clipped at 1, and bounded."""

    def kind(max_norm: Any, inner: Any) -> Any:
        del max_norm
        clip = optax.clip_by_global_norm(1.0)
        bound: Any = bound_update(scope)
        if scope in ("joint", "sum"):
            bound = by_layer(bound, layer_axis)
        return optax.chain(clip, inner, bound)

    return kind


BOUNDS = [f"bound, {scope}" for scope in NUMBERS]


def bounds_of(layer_axis: Callable[[str], int | None]) -> dict[str, Any]:
    """The bounds, as kinds; those that add up ratios see the layers of a stack."""
    return {f"bound, {scope}": _bounded(scope, layer_axis) for scope in NUMBERS}


def slowdown(settings: list[dict[str, Any]], name: str) -> float:
    """Mean over the healthy cells of all settings of an optimizer."""
    lost = []
    for setting in settings:
        plain, own = (setting["contenders"][n] for n in ("unclipped", name))
        is_healthy = np.array(plain["regret"]) <= HEALTHY  # False where it is NaN.
        above = np.array(own["final_loss"]) - np.array(plain["final_loss"])
        lost += above[is_healthy].tolist()
    return float(np.mean(lost)) if lost else 0.0


def bad_batches(seeds: int, first_seed: int) -> dict[str, dict[str, float]]:
    """Excursions, medians of the seeds, by contender and by fault."""
    from benchmarks.bad_batches import FAULTS

    settings = _text_run.Settings(seeds=seeds, first_seed=first_seed)
    adamw = optax.adamw(settings.learning_rate)
    contenders = {
        "optax 1": og.guard(adamw, clip=1.0),
        **{
            f"bound, {scope}": og.guard(
                optax.chain(adamw, bound_update(scope)), clip=1.0
            )
            for scope in NUMBERS
        },
    }
    faults = [fault.batches(settings.half) for fault in FAULTS.values()]
    faulty = _text_run.Batches(*map(np.stack, zip(*faults, strict=True)))
    found = {}
    for name, tx in contenders.items():
        losses = np.asarray(_losses(tx, faulty, settings))  # [seed, fault, evaluation]
        rise = np.max(losses - losses[:, :1], axis=-1)
        rise = np.nan_to_num(rise, nan=np.inf)
        found[name] = dict(zip(FAULTS, np.median(rise, axis=0).tolist(), strict=True))
    return found


def _losses(tx: Any, faulty: Any, settings: _text_run.Settings) -> Any:
    """Those of the second half, of all seeds and faults side by side."""
    half = _text_run.make_half(tx, settings)
    healthy = _text_run.healthy(settings.half)

    def run(seed: Any) -> Any:
        first, key = jax.random.split(jax.random.key(seed))
        params = _text_run.init_params(first, settings)
        before = half(params, tx.init(params), 0, key, healthy)

        def second(bad: Any) -> Any:
            return half(*before[:2], settings.half, key, bad).losses

        return jax.vmap(second)(faulty)

    return jax.jit(jax.vmap(run))(settings.first_seed + np.arange(settings.seeds))


def judge(
    found: dict[str, list[list[dict[str, Any]]]], summary: Any, settings: Any
) -> dict[str, Any]:
    """Prints and returns, for each bound, what was reached of each goal."""
    rows = {}
    for i, optimizer in enumerate(WIDER):
        of_all = [each for by_optimizer in found.values() for each in by_optimizer[i]]
        slow = {name: slowdown(of_all, name) for name in summary[optimizer]}
        widths = {name: row["mean_width"] for name, row in summary[optimizer].items()}
        fixed = [n for n in widths if n.startswith("optax ") and slow[n] <= SLOWDOWN]
        best = max(fixed, key=lambda name: widths[name])
        print(f"\n{optimizer}: the widest clip that slows no healthy run is {best}")
        print("healthy slowdown: " + ", ".join(f"{n} {x:.3f}" for n, x in slow.items()))
        for name in BOUNDS:
            row = summary[optimizer][name]
            regret = row["mean_regret_at_best_rate"]
            ratio = widths[name] / widths[best]
            rows[f"{optimizer}, {name}"] = goals = {
                "width": (ratio, ratio >= WIDER[optimizer]),
                "regret": (regret, regret <= REGRET[optimizer]),
                "healthy slowdown": (slow[name], slow[name] <= SLOWDOWN),
            }
            _show(f"{optimizer}, {name}", goals)
    excursions = bad_batches(settings.seeds, settings.first_seed)
    for name in BOUNDS:
        above = {f: x - excursions["optax 1"][f] for f, x in excursions[name].items()}
        worst = max(above.values())
        rows[f"bad batches, {name}"] = goals = {"above": (worst, worst <= EXCURSION)}
        _show(f"bad batches, {name}", goals)
    print(
        "mean over faults: "
        + ", ".join(f"{n} {_mean(x)}" for n, x in excursions.items())
    )
    goals_met = {k: {n: list(x) for n, x in row.items()} for k, row in rows.items()}
    return {"goals": goals_met, "excursions": excursions}


def _mean(of_faults: dict[str, float]) -> str:
    return f"{statistics.mean(of_faults.values()):.3f}"


def _show(name: str, goals: dict[str, tuple[float, bool]]) -> None:
    told = [f"{g} {x:.3f} {'met' if m else 'MISSED'}" for g, (x, m) in goals.items()]
    print(f"{name}: {', '.join(told)}")
