"""The tests that `make test` leaves to `make test-all`, and both to `make soak`.

They bear the marks `full` and `soak`.
"""

import itertools
from collections.abc import Iterable
from typing import Any

# A file maps to those of its tests that cost more than they catch: the name of a test,
# of one of its cases, or of a `name` that tests of the file take. None stands for all.
Tier = dict[str, set[str] | None]
FULL: Tier = {
    # Studies, and the arithmetic of benchmarks.
    "test_accelerator_kit": None,
    "test_bad_batches": None,
    "test_generalization": None,
    "test_neutral": None,
    "test_neutral_measures": None,
    "test_pictures": None,
    "test_scale_out": None,
    "test_stability": None,
    "test_step_cost": None,
    "test_suggestion": None,
    # Whole programs: each one trains, compiles for an accelerator or starts processes.
    "test_carriers": None,
    "test_contract": None,
    "test_debug": None,
    "test_debug_faults": None,
    "test_debug_flags": None,
    "test_demo": None,
    "test_docs": None,
    "test_faults": None,
    "test_loops_of_others": None,
    "test_notebooks": None,
    "test_packaging": None,
    "test_parallelism": None,
    "test_readme": None,
    "test_sharding": None,
    "test_soak": None,
    "test_resume": {
        "test_best_loads_in_a_fresh_process_without_the_optimizer",
        "test_process_that_is_killed_is_resumed",
        "test_run_that_is_cut_and_resumed_is_the_run_in_one",
    },
    # Programs that take seconds to compile, or to run without optimisation.
    "test_clipping": {"test_kernels_of_a_value_clip_do_not_grow_with_its_sums"},
    "test_loops": {
        "test_member_alone_is_the_member_among_others_and_none_touches_another"
    },
    "test_sketch": {
        f"test_quantiles_are_exact_to_the_stated_relative_error[{name}-{error}]"
        for name in ("lognormal", "heavy", "whole range")
        for error in (0.002, 0.02)
    },
    "test_sweep": {
        "test_run_that_diverged_at_its_first_evaluation_is_not_stable",
        "test_runs_stop_at_their_own_time",
        "test_width_counts_before_the_lowest_value",
    },
    # Two rules that differ in one setting from one that `make test` runs, and all
    # sequences of norms for that one: its loops are slow without optimisation.
    "test_threshold": {
        *("quantile forgets", "quantile with current"),
        "test_entries_of_an_array_are_independent",
        "test_forgetting_quantile_follows_a_lasting_rise",
        "test_nothing_nonfinite_is_kept_and_nothing_is_frozen[quantile]",
        "test_single_bad_norm_is_forgotten[quantile]",
        "test_bad_norms_after_one_another_are_forgotten[quantile]",
        "test_run_of_bad_norms_is_survived[quantile]",
        "test_constant_norms_always_pass[quantile]",
        "test_spike_is_clipped_in_steady_state[quantile]",
        "test_zero_norm_is_no_news[quantile]",
    },
}

# Further cases of a test of which one case or two stay in the other tiers.
SOAK: Tier = {
    "test_debug_faults": {
        # That the faults are as the other tests of the file take them to be.
        "test_every_fault_is_as_planted",
        "test_every_healthy_function_is_finite",
    },
    # One case of each model and of each way to split stays.
    "test_parallelism": {
        f"test_devices_train_as_one_and_skip_together[{case}]"
        for case in (
            "experts on six devices-unchecked",
            "pipeline-unchecked",
            "six experts on four devices-whole",
            "six experts on four devices-checked",
            "split stages-checked",
            "split stages-whole",
        )
    },
    "test_scopes": {
        f"test_fault_in_one_group_spares_the_others_and_is_forgotten[quantile-{scope}]"
        for scope in ("leaf", "group")
    },
    "test_sharding": {"test_compiler_gives_what_one_device_does[explicit]"},
    # Many cases of one law, of which other files hold a part.
    "test_stop_conformance": {"test_stops_where_the_other_system_does"},
}


def tier_of(stem: str, *names: object) -> str | None:
    """The mark of a test in that file with these names; `make test` runs the others."""
    for mark, tier in {"soak": SOAK, "full": FULL}.items():
        listed = tier.get(stem, set())
        if listed is None or any(name in listed for name in names):
            return mark
    return None


def all_pairs(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """A few rows of the product that hold every pair of values of two axes.

    Each row is the one that adds the most pairs, and the first of these in the order of
    the product: the rows are the same in every run.
    """
    rows = {
        row: set(itertools.combinations(enumerate(row), 2))
        for row in itertools.product(*axes)
    }
    missing, chosen = set().union(*rows.values()), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(rows[row] & missing)))
        missing -= rows[chosen[-1]]
    return chosen
