#!/usr/bin/env bash
# Measures on the accelerator that JAX finds, one part at a time:
#
#     bash benchmarks/on_accelerator.sh OUT PART [--quick]
#
# PART is steps, many_leaves, transformer, loops or laws. It writes PART.json, PART.log
# and, but for laws, PART.png into the folder OUT. `--quick` is a dry run, tiny, on a CPU.
# It needs JAX, Optax, Flax, NumPy, matplotlib and pytest; this library need not be
# installed. `PYTHON=/path/to/python` selects the interpreter.
set -euo pipefail
if (($# < 2)); then
  sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//' >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd) part=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$(command -v python || command -v python3)}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 MPLBACKEND=agg
if [[ " $* " == *" --quick "* ]]; then
  export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
fi
"$python" -m "benchmarks.on_accelerator.$part" --out "$out" "$@" 2>&1 | tee "$out/$part.log"
