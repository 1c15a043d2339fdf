import lightning as L
import pytest
from backbones import save_tiny_bert
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

import lit_sparse as ls
from lit_sparse.strategies.support import require_exact


@pytest.mark.parametrize(
    "strategy", [SingleDeviceStrategy(), DDPStrategy(), ls.SparseFSDPStrategy(), ls.SparseFSDP2Strategy()]
)
def test_what_keeps_adapters_equal_is_taken(strategy: Strategy) -> None:
    require_exact(strategy)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (FSDPStrategy, "Use lit_sparse.SparseFSDPStrategy"),
        (ModelParallelStrategy, "Use lit_sparse.SparseFSDP2Strategy"),
        # Made without its __init__, which wants the package.
        (DeepSpeedStrategy, "do not work under DeepSpeed.*overwrites the zeros"),
        (object, "not tested under object"),
    ],
)
def test_what_does_not_is_refused_with_what_to_use(kind: type[Strategy], message: str) -> None:
    with pytest.raises(ls.UsageError, match=message):
        require_exact(kind.__new__(kind))


def test_a_trainer_is_refused_at_set_up(tmp_path: str) -> None:
    module = ls.SequenceClassification(save_tiny_bert(tmp_path), ls.SoRA(rank=2, threshold=0.1), num_labels=2)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(), logger=False)
    with pytest.raises(ls.UsageError, match="SparseFSDP2Strategy"):
        ls.Sparsify(module.method).setup(trainer, module, "fit")
