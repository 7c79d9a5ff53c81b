# `make help` lists what there is. Everything is installed into .venv.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

# The first Python >= 3.11 found; `make PYTHON=/path/to/python3.12 test` overrides.
PYTHON ?= $(firstword $(foreach p,python3.11 python3 python3.12 python3.13 python3.14, \
  $(shell $(p) -c 'import sys, venv; print("$(p)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)))
PY := .venv/bin/python
# On a terminal pip shows how far it is. (GNU make sets MAKE_TERMOUT there.)
PIP := $(PY) -m pip --disable-pip-version-check --no-input install \
  $(if $(MAKE_TERMOUT),--progress-bar=on,--quiet)

# Further arguments: `make demo ARGS=--quick`, `make test ARGS="-k stop -x"`.
ARGS ?=
# Two processes for two cores; more pay only while each has a core to compile on.
WORKERS ?= 2

.PHONY: help
help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|' 2>/dev/null \
	  || sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1   \2/p' Makefile

# The environment -----------------------------------------------------------

.PHONY: install
install: .venv/installed  ## create .venv with everything the other targets need

.venv/bin/pip:
	@test -n "$(PYTHON)" || { echo "Python >= 3.11 was not found; run make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv

# pip reads dependency groups since 25.1; the one that comes with Python is older.
.venv/installed: pyproject.toml | .venv/bin/pip
	@echo 'Installing into .venv; the first time this takes a few minutes.'
	$(PIP) 'pip>=25.1'
	$(PIP) --editable '.[all]' --group dev
	@touch $@

.venv/installed-notebooks: pyproject.toml .venv/installed
	$(PIP) --group notebooks
	@touch $@

.venv/installed-docs: pyproject.toml .venv/installed
	$(PIP) --group docs
	@touch $@

# Ahead-of-time compilers, at the versions that belong to the installed JAX. No
# accelerator is needed to compile, and none of the nvidia-* packages. They stay
# outside site-packages: JAX would complain of the missing cuDNN on every start.
ACCELERATORS := .venv/accelerators

$(ACCELERATORS)/installed: .venv/installed
	rm -rf $(ACCELERATORS)
	$(PIP) --target $(ACCELERATORS) $$($(PY) -c "import importlib.metadata as m; \
	  names = 'libtpu=', 'jax-cuda13-plugin<', 'jax-cuda13-plugin='; \
	  print(*(r.partition(';')[0] for r in m.requires('jax') if r.startswith(names)))")
	@touch $@

# For users -----------------------------------------------------------------

.PHONY: demo
demo: .venv/installed  ## train on real text with and without the guard (ARGS=--quick)
	$(PY) -m optax_guard demo $(ARGS)

# XLA's older generator of code for the CPU compiles several times as fast. The full tier
# runs tests of numbers again, in the installed wheel, compiled as users compile; not
# those of an accelerator's sums on a CPU, which no user runs.
NUMERIC := $(patsubst %,tests/test_%.py,norms clipping mixed_precision)
QUICK := OPTAX_GUARD_TEST_CODEGEN=quick
# Compiled programs are kept between runs; `make clean` removes them.
CACHE := OPTAX_GUARD_TEST_CACHE=$(abspath .cache/jax)
PYTEST = $(CACHE) $(abspath $(PY)) -m pytest -n $(WORKERS) --dist loadgroup
# pyproject.toml selects the short tier. This selects both tiers.
BOTH := -m 'not multihost and not soak'

.PHONY: test
test: .venv/installed  ## run the short tier: the tests of a change
	$(QUICK) $(PYTEST) $(ARGS)

# `make test-all` is `make test` and `make test-rest`, or the tests that ARGS names.
.PHONY: test-all test-rest
ifeq ($(ARGS),)
test-all: test test-rest  ## run both tiers: studies, every optimizer, the wheel
else
test-all: .venv/installed
	$(QUICK) $(PYTEST) $(BOTH) $(ARGS)
endif

test-rest: .venv/installed
	$(QUICK) $(PYTEST) -m full
	$(MAKE) test-wheel

# The wheel as a user installs it, and the tests, without the source tree.
ELSEWHERE := build/elsewhere

.PHONY: elsewhere
elsewhere: .venv/installed
	rm -rf $(ELSEWHERE)
	$(PY) -m hatchling build -t wheel --directory $(ELSEWHERE)
	$(PIP) --no-deps --target $(ELSEWHERE)/site $(ELSEWHERE)/*.whl
	cp -r tests pyproject.toml $(ELSEWHERE)
	cd $(ELSEWHERE) && PYTHONPATH=site $(abspath $(PY)) -c "import optax_guard, pathlib; \
	  assert pathlib.Path.cwd() / 'site' in pathlib.Path(optax_guard.__file__).parents"

.PHONY: test-wheel
test-wheel: elsewhere  ## run the tests of numbers with the installed wheel
	cd $(ELSEWHERE) && PYTHONPATH=site $(PYTEST) $(BOTH) -k 'not gpu and not tpu' $(NUMERIC)

# The lowest versions that pyproject.toml states, and the newest there are. pip takes no
# extras in constraints.
.venv-lowest/installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-lowest
	$(PYTHON) -c "import re, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  stated = p['dependencies'] + sum(p['optional-dependencies'].values(), []); \
	  print(*(re.sub(r'\[.*\]', '', r).replace('>=', '==') for r in stated if '>=' in r), sep='\n')" \
	  > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip --no-input install --quiet 'pip>=25.1'
	.venv-lowest/bin/python -m pip --no-input install --quiet --group tests \
	  --group benchmarks --editable '.[all]' --constraint .venv-lowest/constraints.txt
	@touch $@

# `make NEWEST=/path/to/python3.14 test-newest` overrides.
NEWEST ?= $(firstword $(foreach v,3.14 3.13 3.12,$(foreach p, \
  python$(v) $(wildcard $(HOME)/.pyenv/versions/$(v).*/bin/python), \
  $(shell $(p) -c 'import venv; print("$(p)")' 2>/dev/null))))

.venv-newest/installed: pyproject.toml
	@test -n "$(NEWEST)" || { echo "Python >= 3.12 was not found; run make NEWEST=/path/to/python"; exit 1; }
	$(NEWEST) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip --no-input install --quiet 'pip>=25.1'
	.venv-newest/bin/python -m pip --no-input install --quiet --group tests \
	  --group benchmarks --editable '.[all]'
	@touch $@

.venv-ecosystem/installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-ecosystem
	.venv-ecosystem/bin/python -m pip --no-input install --quiet 'pip>=25.1'
	.venv-ecosystem/bin/python -m pip --no-input install --quiet --group tests \
	  --group ecosystem --editable '.[all]'
	@touch $@

.PHONY: test-ecosystem
test-ecosystem: .venv-ecosystem/installed  ## log to W&B, MLflow, trackio, metrax; read them
	.venv-ecosystem/bin/python -m pytest -n 0 tests/test_ecosystem.py $(ARGS)

.PHONY: test-lowest test-newest test-matrix
test-lowest test-newest: test-%: .venv-%/installed
	$(QUICK) .venv-$*/bin/python -m pytest -n $(WORKERS) --dist loadgroup $(BOTH) $(ARGS)

test-matrix: test-lowest test-newest  ## run the tests with the lowest versions and the newest

# For developers --------------------------------------------------------------

.PHONY: lint
lint: .venv/installed  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

.PHONY: format
format: .venv/installed  ## let ruff fix and format what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

.PHONY: types
types: elsewhere  ## pyright on all, pyright and mypy on what a user writes
	$(PY) -m pyright
	mkdir $(ELSEWHERE)/user
	cp tests/typing_user.py $(ELSEWHERE)/user
	echo '{}' > $(ELSEWHERE)/user/pyrightconfig.json
	cd $(ELSEWHERE)/user && export PYTHONPATH=../site && \
	  $(abspath $(PY)) -m pyright --pythonpath $(abspath $(PY)) typing_user.py && \
	  $(abspath $(PY)) -m mypy --strict --disable-error-code import-untyped typing_user.py

.PHONY: bench
bench: .venv/installed  ## print the cost of a guarded step beside Optax's (ARGS)
	$(PY) -m benchmarks.step_cost $(ARGS)

.PHONY: test-accelerators
test-accelerators: $(ACCELERATORS)/installed  ## compile for TPU and GPU, assert the cost
	PYTHONPATH=$(ACCELERATORS) $(PYTEST) --no-loadscope-reorder $(BOTH) \
	  tests/accelerators $(ARGS)

# In one process: the jobs that it starts have enough of their own.
.PHONY: test-multihost
test-multihost: .venv/installed  ## run `fit` on several processes of this machine
	$(PY) -m pytest -n 0 -m multihost tests/multihost $(ARGS)

.venv/installed-mutants: pyproject.toml .venv/installed
	$(PIP) --group mutants
	@touch $@

# In a clone of what is committed: a mutant replaces the file while it is tried.
.PHONY: mutants
mutants: .venv/installed-mutants  ## change the core, see a test fail (ARGS=_norms/tree_norm)
	rm -rf build/mutants
	git clone --quiet . build/mutants
	cd build/mutants && $(QUICK) OPTAX_GUARD_TEST_CACHE=$$PWD/cache \
	  $(abspath $(PY)) tests/mutants.py $(ARGS)

CORE := _norms/* _clipping/parts _clipping/global_norm _guarding/guard \
  _guarding/judging _guarding/step threshold/* stop/*
CORE_TESTS := norms clipping guarding skip mixed_precision masking threshold sketch \
  early_stopping stop_rules bad_input errors checks

.PHONY: coverage
coverage: .venv/installed-mutants  ## lines and branches of the core that its tests reach
	$(QUICK) $(PY) -m pytest -n 0 $(BOTH) --cov=optax_guard --cov-branch \
	  --cov-report= $(CORE_TESTS:%=tests/test_%.py) $(ARGS)
	$(PY) -m coverage report -m --include="$$(printf 'optax_guard/%s.py,' $(CORE))"

.PHONY: soak
soak: .venv/installed  ## a million steps, 50 kills, 160 faults, every optimizer and dtype
	OPTAX_GUARD_SOAK=1 $(PY) -m pytest -n 0 $(BOTH) tests/test_soak.py tests/test_faults.py
	$(QUICK) $(PYTEST) -m soak

# Executed notebooks go to OUT; `make notebooks OUT=notebooks` renews the committed ones.
# Side by side, because most of the time is compilation, on one core; a cell that raises
# fails the target.
OUT ?= build/notebooks

.PHONY: notebooks
notebooks: .venv/installed-notebooks  ## execute every notebook, check its numbers
	printf '%s\n' notebooks/*.ipynb | xargs -n 1 -P $(WORKERS) $(PY) -m nbconvert \
	  --to notebook --execute --output-dir $(OUT) --log-level=WARN \
	  --ExecutePreprocessor.timeout=300 --ExecutePreprocessor.record_timing=False \
	  --ClearMetadataPreprocessor.enabled=True \
	  --ClearMetadataPreprocessor.preserve_nb_metadata_mask=kernelspec
	OPTAX_GUARD_NOTEBOOKS=$(OUT) $(PY) -m pytest -n 0 -q $(BOTH) tests/test_notebooks.py \
	  -k as_the_text_says

# A warning fails it, and so does a link inside that leads nowhere. `make test-all` runs
# the blocks of the pages.
.PHONY: docs
docs: .venv/installed-docs  ## build the pages of docs/ and the API reference in build/docs
	$(PY) -m sphinx -W --keep-going -n -q -b html docs build/docs $(ARGS)

.PHONY: wheel
wheel: .venv/installed  ## build wheel and sdist in dist/ and check what is in them
	rm -rf dist
	$(PY) -m build --outdir dist
	OPTAX_GUARD_DIST=dist $(PY) -m pytest $(BOTH) tests/test_packaging.py

.PHONY: clean
clean:  ## remove what can be made again, except .venv
	rm -rf build dist runs docs/api docs/notebooks .cache .pytest_cache .ruff_cache .hypothesis
