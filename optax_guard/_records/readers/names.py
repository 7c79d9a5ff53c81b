"""Names of columns: what other records call the columns of a history."""

import re
from collections.abc import Iterable, Mapping

from optax_guard._records.grouped import GROUPED_NAMES

# Name in a history -> its names in other records, in the order of the search. Before
# they are compared, capitals become small, and every row of blanks, dots, slashes,
# hyphens and brackets one underscore: `Train/Loss` and `train loss` are `train_loss`.
COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "step": (
        *("step", "global_step", "train_global_step", "trainer_global_step"),
        *("iteration", "iter", "iterations", "current_steps", "steps"),
        *("train_step", "training_step", "_step"),
    ),
    "epoch": ("epoch", "train_epoch", "epochs"),
    "train_loss": (
        *("train_loss", "loss", "training_loss", "loss_train", "train_loss_step"),
        *("loss_step", "total_loss", "train_total_loss", "avg_train_loss", "lm_loss"),
        *("learning_loss", "loss_metrics_global_avg_loss", "train_crossentropyloss"),
        *("train_ce_loss", "train_cross_entropy_loss", "reduced_train_loss"),
        *("learner_loss", "model_loss", "train_losses", "losses", "train_epoch_loss"),
        *("train_loss_epoch", "loss_epoch", "epoch_loss"),
    ),
    "val_loss": (
        *("val_loss", "eval_loss", "valid_loss", "validation_loss", "dev_loss"),
        *("loss_val", "loss_valid", "loss_eval", "eval_avg_loss", "lm_loss_validation"),
        *("validation_metrics_loss", "val_losses", "valid_losses", "eval_losses"),
        *("val_loss_epoch", "test_loss", "loss_test", "test_losses"),
    ),
    "grad_norm": (
        *("grad_norm", "raw_grad_norm", "gradient_norm", "train_grad_norm", "gnorm"),
        *("train_gradient_norm", "learning_raw_grad_norm", "learning_grad_norm"),
        *("global_norm", "global_grad_norm", "total_norm", "total_grad_norm"),
        *("grad_norm_total", "grad_2_0_norm_total", "optim_total_grad_norm"),
        *("learner_optimizer_gradient_norm", "grad_norm_step", "grad_norms"),
    ),
    "clipped_norm": ("clipped_norm", "grad_norm_clipped", "clipped_grad_norm"),
    "clip_threshold": ("clip_threshold", "max_grad_norm"),
    "clip_rate": ("clip_rate",),
    "learning_rate": (
        *("learning_rate", "lr", "train_learning_rate", "train_lr"),
        *("lr_sgd", "lr_adam", "lr_adamw", "lr_pg0", "x_lr0", "optim_learning_rate"),
        *("optim_lr", "optim_learning_rate_group0", "optim_lr_group_0"),
        *("learning_current_learning_rate", "learner_optimizer_learning_rate"),
    ),
}
# MaxText records the norm before the clip and the one after it.
_BEFORE_CLIP, _AFTER_CLIP = "learning_raw_grad_norm", "learning_grad_norm"
# Losses of evaluations, of one set or of several: `eval_nli_loss`, `eval/c4/loss`.
_SET_LOSS = re.compile(
    r"(?:eval|evaluation|val|valid|validation|dev|test)_(?:\w+_)?"
    r"(?:loss|crossentropyloss|ce_loss|cross_entropy|nll)(?:_dataloader_idx_\d+)?"
)
# YOLO records the parts of its loss, weighted, and not their sum.
_PARTS = ("box", "obj", "cls", "dfl", "seg", "sem", "pose", "kobj")
_SEPARATORS = re.compile(r"[\s/.\-()\[\]]+")


def plain(name: str) -> str:
    """A name in the form in which names are compared."""
    return _SEPARATORS.sub("_", name.strip().lower()).rstrip("_")


# The names under which `fit` logs to other tools.
_OURS = {plain(theirs): ours for ours, theirs in reversed(GROUPED_NAMES.items())}
_OURS["value"] = "value"


def sources_of(names: Iterable[str]) -> dict[str, str]:
    """For each name in a history the column that holds it, if there is one."""
    theirs: dict[str, str] = {}
    for name in names:
        theirs.setdefault(plain(name), name)
        if plain(name) == name:
            theirs[name] = name
    found = {}
    for ours, others in COLUMN_NAMES.items():
        taken = {plain(x) for x in found.values()}
        wanted = next((x for x in others if x in theirs and x not in taken), None)
        if wanted is not None and ours not in found:
            found[ours] = theirs[wanted]
        if wanted == _BEFORE_CLIP and _AFTER_CLIP in theirs:
            found["clipped_norm"] = theirs[_AFTER_CLIP]
    if "val_loss" not in found and (sets := evaluation_sets(theirs.values())):
        found["val_loss"] = sets[0]
    for name, original in theirs.items():
        if name in _OURS and original not in found.values():
            found.setdefault(_OURS[name], original)
    return found


def evaluation_sets(names: Iterable[str]) -> list[str]:
    """The columns that hold the loss of an evaluation set, except for parts of one."""
    found = [x for x in names if _SET_LOSS.fullmatch(plain(x))]
    return [x for x in found if plain(x).split("_")[1] not in _PARTS]


def part_names(names: Iterable[str], split: str) -> list[str]:
    """The columns that hold the parts of YOLO's loss, of "train" or "val"."""
    wanted = {f"{split}_{part}_loss" for part in _PARTS}
    return [x for x in names if plain(x) in wanted]


class Renamer:
    """Changes the names of rows to those of `COLUMN_NAMES`; others stay.

    The first column that holds, say, a training loss, is the training loss of all rows:
    a step's loss and an epoch's mean are never one series.

    Args:
      sources: The column of a name in a history, where it is known already.
      leave: A name in a history that no column is given.
    """

    def __init__(self, sources: Mapping[str, str] | None = None, leave: str = ""):
        self._sources = dict(sources or {})
        self._given = frozenset(self._sources)
        self._leave = leave
        self._known: dict[tuple[str, ...], list[tuple[str, str]]] = {}

    def __call__(self, row: Mapping[str, float]) -> dict[str, float]:
        """The row under its new names."""
        names = tuple(row)
        changes = self._known.get(names)
        if changes is None:
            changes = self._known[names] = self._changes(names)
        if not changes:
            return dict(row)
        moved = dict(changes)
        kept = {k: v for k, v in row.items() if k not in moved}
        return kept | {ours: row[theirs] for theirs, ours in moved.items()}

    def _changes(self, names: tuple[str, ...]) -> list[tuple[str, str]]:
        changes = []
        for ours, theirs in sources_of(names).items():
            if ours == self._leave or ours in self._given:
                continue
            if self._sources.setdefault(ours, theirs) == theirs != ours:
                changes.append((theirs, ours))
        given = [(self._sources[ours], ours) for ours in self._given]
        return changes + [x for x in given if x[0] in names and x[0] != x[1]]


def rename(row: Mapping[str, float]) -> dict[str, float]:
    """Changes the names of one row; see `Renamer`."""
    return Renamer()(row)
