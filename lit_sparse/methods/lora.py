"""LoRA (Hu et al. 2021): the dense baseline on the same layer."""

from __future__ import annotations

from lit_sparse.methods.base import InitWeights, Overrides, SparseMethod


class LoRA(SparseMethod):
    """Low-rank adapters that stay dense: what the sparse methods are compared with.

    Args:
        target_modules: ``"all-linear"``: every linear layer but the task head; a list of whole trailing name
            parts such as ``["query", "value"]``; or one regular expression over full names.
        rank: Ranks r of every adapter.
        alpha: Numerator of the scale alpha / rank of the adapter's output.
        dropout: Probability of zeroing an entry of the adapter's input in training.
        layers: Numbers of the transformer blocks to adapt, or one number; None: all.
        exclude_modules: Layers to leave out: a list of trailing name parts or a regular expression.
        train_head: Train the task head (classifier, score …), found by structure; or the names of the
            modules to train whole.
        use_rslora: Scale by alpha / √rank, so that a large rank does not shrink the output.
        init_weights: ``lora``: A random and B zero. ``pissa``: A and B take the largest singular values out of the
            frozen weight (Meng et al. 2024, arXiv:2404.02948), which is changed for that: only the rest of it stays
            frozen.
        overrides: Other settings for some layers: trailing name parts or a regular expression, to rank and alpha,
            such as
            ``{"attention.output.dense": {"rank": 16}}``. The first pattern that matches a layer holds for it.

    Raises:
        UsageError: If an argument is outside its range or ``target_modules`` is empty.

    Source:
        Hu et al. 2021 (arXiv:2106.09685).
    """

    def __init__(
        self,
        target_modules: str | list[str] = "all-linear",
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        layers: int | list[int] | None = None,
        exclude_modules: str | list[str] | None = None,
        train_head: bool | list[str] = True,
        use_rslora: bool = False,
        init_weights: InitWeights = "lora",
        overrides: Overrides | None = None,
    ) -> None:
        super().__init__(
            target_modules,
            rank,
            alpha,
            dropout,
            layers,
            exclude_modules,
            train_head,
            use_rslora,
            init_weights,
            overrides=overrides,
        )
