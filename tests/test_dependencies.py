"""The lower bounds of pyproject.toml keep known bad versions out."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent


def specifier(package: str) -> SpecifierSet:
    """The version specifier of ``package`` among the dependencies of pyproject.toml."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    begin = lines.index("dependencies = [")
    end = lines.index("]", begin)
    requirements = [Requirement(line.split('"')[1]) for line in lines[begin + 1 : end]]
    return next(r.specifier for r in requirements if r.name == package)


@pytest.mark.parametrize("package", ["lightning", "pytorch-lightning"])
def test_lightning_is_bounded_above_its_malicious_and_vulnerable_versions(package: str) -> None:
    """2.6.2 and 2.6.3 were malicious uploads; up to 2.6.5, loading a checkpoint can run code (GHSA-qqmf-gpg7-g8gw)."""
    allowed = specifier(package)
    for bad in ("2.5.6", "2.6.1", "2.6.2", "2.6.3", "2.6.4", "2.6.5"):
        assert not allowed.contains(bad), bad
    assert allowed.contains("2.6.6")


@pytest.mark.parametrize("file", [".ci/lowest.txt", "constraints.txt"])
def test_the_pinned_versions_are_allowed(file: str) -> None:
    pins = dict(line.split("==") for line in (ROOT / file).read_text().splitlines() if "==" in line)
    for package in ("lightning", "pytorch-lightning"):
        assert specifier(package).contains(pins[package])
