"""What users see of the package: where names come from, what `dir` and `help` list."""

import doctest
import inspect
import pickle
import pydoc
import re
import subprocess
import sys

import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")

import jax.numpy as jnp
import optax

import optax_guard as og
from tests.public import public_modules, public_names

MODULES = public_modules()
NAMES = public_names()


def test_public_objects_name_a_public_module():
    wrong = []
    for name, value in NAMES.items():
        if inspect.isfunction(value) or inspect.isclass(value):
            named = value.__module__.removeprefix("optax_guard").lstrip(".")
            if getattr(MODULES.get(named), value.__qualname__, None) is not value:
                wrong.append(f"{name} names {value.__module__}")
    assert wrong == []


def test_a_pickle_names_no_private_module():
    tx = og.guard(
        optax.adam(0.1),
        clip=og.threshold.zscore(),
        skip=og.skip.spike(watch="grad_norm"),
    )
    stopper = og.early_stopping(og.stop.plateau(2), smooth=og.stop.median(3))
    states = tx.init(jnp.ones(2)), stopper.init(jnp.ones(2))
    text = pickle.dumps(states)
    assert not re.search(rb"optax_guard[.\w]*\._", text)
    assert b"optax_guard\x94" in text
    assert pickle.loads(text)[0].num_skipped == 0


def test_the_source_of_a_function_is_found():
    functions = [inspect.unwrap(x) for x in NAMES.values() if inspect.isfunction(x)]
    assert [
        function.__name__
        for function in functions
        if f"def {function.__name__}(" not in inspect.getsource(function)
    ] == []


def test_dir_lists_public_names_and_nothing_else():
    for name, module in MODULES.items():
        listed, states = dir(module), getattr(module, "_STATES", [])
        later = getattr(module, "_ON_FIRST_USE", [])
        assert listed == sorted([*module.__all__, *states, *later]), name
        assert len(set(listed)) == len(listed), name
        assert all(x.isidentifier() and not x.startswith("_") for x in listed), name


def test_help_lists_the_functions():
    text = pydoc.plain(pydoc.render_doc(og))
    for name, value in NAMES.items():
        if "." not in name and inspect.isfunction(value):
            assert f"    {name}(" in text, name


def test_a_module_without_its_extra_is_absent_and_says_what_to_install():
    program = (
        "import sys\n"
        "sys.modules['flax'] = None\n"
        "import pydoc, optax_guard as og\n"
        "assert not hasattr(og, 'flax') and hasattr(og, 'loops')\n"
        "assert 'clip_by_global_norm' in pydoc.render_doc(og)\n"
        "from optax_guard import *\n"
        "try:\n"
        "    from optax_guard import flax\n"
        "except ImportError as error:\n"
        "    assert 'optax-guard[flax]' in str(error)\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_modules_with_extras_are_imported_on_first_use():
    program = (
        "import sys, optax_guard as og\n"
        "names = ['analysis', 'debug', 'flax', 'loops', 'plotting']\n"
        "assert not any(f'optax_guard.{name}' in sys.modules for name in names)\n"
        "found = [getattr(og, name).__name__ for name in names]\n"
        "assert found == [f'optax_guard.{name}' for name in names]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="'optax_guard' has no attribute 'gard'"):
        getattr(og, "gard")  # noqa: B009 - type checkers know that it is absent


def test_examples_are_found_where_their_code_stands():
    """Doctest goes by `__module__`; `conftest.py` by the file."""
    found = doctest.DocTestFinder().find(og, "optax_guard")
    assert not any(test.examples for test in found)
    code = sys.modules[inspect.unwrap(og.guard).__globals__["__name__"]]
    assert any(
        test.name.endswith(".guard") for test in doctest.DocTestFinder().find(code)
    )
