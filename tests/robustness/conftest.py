"""Every test of bad input runs in a copy of a project that is right."""

import pytest
from hostile import enter, make_project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(autouse=True)
def _copy_of_the_project(project, tmp_path, _own_folder):
    enter(project, tmp_path)
