"""The command: `python -m benchmarks.neutral`."""

import argparse
import os
import pathlib
import sys

import benchmarks.neutral

# To try many kernels for each of many tiny products takes longer than to run them. A
# dry run on a CPU is compiled as fast as can be.
_FLAGS = "--xla_gpu_autotune_level=0"
_QUICK_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=benchmarks.neutral.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=pathlib.Path, help="the folder to write to")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--part", choices=["A", "B", "C"])
    what.add_argument("--quick", action="store_true", help="a dry run on a CPU")
    what.add_argument("--table", type=pathlib.Path, help="the folder of both parts")
    parser.add_argument("--round", type=int, choices=[1, 2], default=1)
    parser.add_argument(
        "--seconds", type=float, default=470, help="begin nothing new after these"
    )
    args = parser.parse_args()
    if args.out is None and args.table is None:
        parser.error("`--out` is needed")
    out = pathlib.Path(args.out or args.table)
    if args.quick:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", _QUICK_FLAGS if args.quick else _FLAGS)
    import jax  # Reads the environment.

    jax.config.update("jax_default_matmul_precision", "highest")
    if args.table is not None:
        from benchmarks.neutral._table import make_table

        make_table(out)
        return
    if jax.default_backend() == "cpu" and not args.quick:
        sys.exit("JAX finds only a CPU. `--quick` is a dry run on it.")
    from benchmarks.neutral._study import run_part

    run_part(args.part, args.round, out, args.seconds)


if __name__ == "__main__":
    main()
