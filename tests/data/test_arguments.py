"""The arguments of data modules, most of which they inherit."""

import inspect

import pytest
from jsonargparse import ArgumentParser

import lit_sparse as ls
from lit_sparse.data.rows import RowData

KINDS = [getattr(ls, name) for name, home in ls._HOME.items() if home.startswith("data.")]
BATCHES = {"batch_size", "eval_batch_size", "num_workers", "seed"}
FIXED = {
    ls.GLUE: {"name", "data_files", "validation_fraction", "text", "text_pair", "label", "labels", "metrics"},
    ls.QuickstartReviews: {"path", "name", "revision", "data_files", "validation_fraction", "text", "label", "labels"},
    ls.ReasoningData: {"name", "revision", "data_files", "response"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_help_explains_every_argument_and_its_type(kind):
    assert issubclass(kind, RowData)
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "data")
    actions = {action.dest.removeprefix("data."): action for action in parser._actions if "data." in action.dest}
    assert actions.keys() == inspect.signature(kind).parameters.keys() >= BATCHES
    assert all(action.help.strip() for action in actions.values())
    assert "Unvalidated" not in parser.format_help()


@pytest.mark.parametrize("kind", FIXED)
def test_what_a_data_set_decides_is_no_argument(kind):
    assert not FIXED[kind] & inspect.signature(kind).parameters.keys()


def test_a_sub_class_of_its_own_takes_the_arguments_it_passes_on():
    class Own(RowData):
        def __init__(self, rows: int) -> None:
            super().__init__(batch_size=rows)

    one, other = Own(3), Own(3)
    assert (one.batch_size, one.path, one.num_workers) == (3, None, 0)
    assert len({one, other, one}) == 2  # by identity, as Lightning keeps them
    with pytest.raises(ls.UsageError, match="batch_size must be at least 1; got 0"):
        Own(0)
