"""The base of the text data modules: tokenise rows once, serve padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from lit_sparse.data.padding import PadRows
from lit_sparse.data.rows import Collator, RowData
from lit_sparse.data.sampling import LengthGroupedSampler, RowSampler
from lit_sparse.data.tokenizers import Prompt, identify_tokenizer, load_tokenizer, prompt_tokens
from lit_sparse.errors import UsageError, require_range


@dataclass(kw_only=True, eq=False, repr=False)
class TextData(RowData):
    """Tokenises rows once and serves padded batches; the base of the text data modules.

    Args:
        tokenizer: Hub id or folder of the tokenizer; None is that of the model's ``backbone``.
        max_length: Longest row in tokens; longer ones are cut. The tokenizer's own limit holds if it is lower.
            Attention costs time with the square of the length.
        length_grouped: Whether a training batch holds rows of similar length, which saves most of the padding. If not,
            rows are only shuffled.
    """

    tokenizer: str | None = None
    max_length: int = 128
    length_grouped: bool = True

    _needs_offsets: ClassVar[bool] = False  # whether the place of each token in the text matters

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("max_length", self.max_length, at_least=1)

    @property
    def named_processor(self) -> str | None:
        """The tokenizer in place of the backbone's, which exports write beside the model."""
        return self.tokenizer

    @property
    def pad_token_id(self) -> int:
        """The token that pads short rows; a model that looks for the last real token must know it. After setup."""
        return int(self._tokenizer.pad_token_id)

    def decode(self, tokens: Tensor) -> list[str]:
        """The texts of rows of token ids, without special tokens. After setup."""
        return self._tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """A batch of prompts for ``generate``, padded on the left. After setup.

        Args:
            prompts: Texts, or messages for the tokenizer's chat template.
        """
        rows = [{"input_ids": prompt_tokens(self._tokenizer, prompt)} for prompt in prompts]
        return PadRows(self.pad_token_id, left=True)(rows)

    def _recipe(self) -> list[Any]:
        return [self._tokenizer_hash, self._token_limit]

    def _collator(self, role: str) -> Collator:  # noqa: ARG002 - a sub-class looks at the role
        return DataCollatorWithPadding(self._tokenizer)

    def _load_processor(self) -> None:
        self._tokenizer = load_tokenizer(self._tokenizer_name, self._new_tokens())
        self._tokenizer_hash = identify_tokenizer(self._tokenizer)
        self._token_limit = min(self.max_length, self._tokenizer.model_max_length)
        if self._needs_offsets and not self._tokenizer.is_fast:
            raise UsageError(
                f"{type(self).__name__} needs a fast tokenizer, which knows the place of each token in the text; "
                f"{type(self._tokenizer).__name__} is none: give another tokenizer."
            )
        if self._needs_offsets:
            self._tokenizer.padding_side = "right"  # positions are counted from the first token

    @property
    def _tokenizer_name(self) -> str:
        return self.tokenizer or self._backbone_of("tokenizer")

    def _new_tokens(self) -> list[str]:
        """The tokens that the Trainer's module adds to those of its backbone."""
        new: list[str] = getattr(getattr(self.trainer, "lightning_module", None), "new_tokens", None) or []
        if new and self.tokenizer is not None and self.tokenizer != self._backbone_of("tokenizer"):
            raise UsageError(
                f"The module's new_tokens extend the tokenizer of its backbone {self._backbone_of('tokenizer')!r}, and "
                f"the data names {self.tokenizer!r}: leave tokenizer out."
            )
        return new

    def _train_sampler(self, rows: Dataset, shard: dict[str, Any]) -> RowSampler:
        if self.length_grouped:
            return LengthGroupedSampler(list(rows["length"]), self.batch_size, **shard, seed=self.seed)
        return super()._train_sampler(rows, shard)

    def _loader(self, rows: Dataset, role: str, sampler: RowSampler | None = None) -> DataLoader[Any]:
        self._require_vocabulary(rows)
        return super()._loader(rows.remove_columns("length"), role, sampler)

    def _require_vocabulary(self, rows: Dataset) -> None:
        """Refuse tokens for which the backbone has no embedding; without this check they end in an index error."""
        model: Any = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        find = getattr(model, "get_input_embeddings", None)
        embeddings = getattr(find() if find is not None else None, "num_embeddings", None)
        if embeddings is None or "input_ids" not in rows.column_names or not len(rows):
            return
        ids = rows.data.column("input_ids")
        while pa.types.is_list(ids.type) or pa.types.is_large_list(ids.type):
            ids = pc.list_flatten(ids)
        largest = pc.max(ids).as_py()
        if largest is not None and largest >= embeddings:
            raise UsageError(
                f"The rows hold the token {largest}, and the backbone has embeddings for {embeddings}: its tokenizer "
                "is another model's, or was given more tokens. Name the right tokenizer, or the tokens in the model's "
                "new_tokens."
            )
