"""What does a guarded step cost on an accelerator, of parameters in 400 leaves?"""

from benchmarks.on_accelerator import _kit, steps

if __name__ == "__main__":
    steps.run(_kit.read_arguments(steps.__doc__), "many_leaves", leaves=400)
