"""lit_sparse.data.tokenizers: what a tokenizer adds on its own, whatever its vocabulary."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lit_sparse.data.tokenizers import added_tokens, open_ended

WORDS = {"<s>": 0, "</s>": 1, "--": 2, "kalo": 3, "sleeps": 4}


def of_words(template=None) -> PreTrainedTokenizerFast:
    """A tokenizer that knows whole words only, and fails at any other."""
    inner = Tokenizer(models.WordLevel(WORDS))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is not None:
        inner.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")  # noqa: S106


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [(None, [], []), ("<s> $A", [0], []), ("$A </s>", [], [1]), ("<s> $A </s>", [0], [1])],
)
def test_a_tokenizer_without_a_token_for_unknown_words_is_asked_in_its_own_words(template, before, after):
    tokenizer = of_words(template)
    assert added_tokens(tokenizer) == (before, after)
    assert open_ended(tokenizer, ["kalo sleeps"]) == [[*before, 3, 4]]
