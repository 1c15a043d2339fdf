"""Words of the command line, as they reach a parser."""

import pytest

from lit_sparse.cli.commands import spelled_out
from lit_sparse.serving.from_checkpoint import export_checkpoint


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--require-final", "--require_final=true"),
        ("--require_final", "--require_final=true"),
        ("--require-final --ckpt-path a-b.ckpt", "--require_final=true --ckpt_path a-b.ckpt"),
        ("--require_final true --ckpt_path=a-b.ckpt", "--require_final true --ckpt_path=a-b.ckpt"),
        ("--require-final=false --output --x", "--require_final=false --output --x"),
        ("--no-such-option -h", "--no-such-option -h"),
    ],
)
def test_options_may_have_dashes_and_switches_no_value(typed, meant):
    assert spelled_out(typed.split(), export_checkpoint) == meant.split()
