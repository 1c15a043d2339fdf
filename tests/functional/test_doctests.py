"""The examples in the docstrings of the formulas are right."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import lit_sparse.functional

MODULES = [module.name for module in pkgutil.iter_modules(lit_sparse.functional.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    found = doctest.testmod(importlib.import_module(f"lit_sparse.functional.{name}"), extraglobs={"torch": torch})
    assert found.attempted > 0
    assert found.failed == 0
