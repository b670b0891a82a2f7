"""A draft model speaks in the target's tokens, or is refused."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from ryzen_compile.errors import PromptError
from ryzen_compile.runtime.speculative.same_tokens import require_same_tokens

WORDS = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}


@dataclass
class Words:
    vocab: dict[str, int] = field(default_factory=lambda: dict(WORDS))
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1

    def get_vocab(self) -> dict[str, int]:
        return self.vocab


def test_equal_tables_pass() -> None:
    require_same_tokens(Words(), Words(), 4, 4)
    require_same_tokens(None, None, 4, 4)


@pytest.mark.parametrize(
    ("draft", "vocab", "message"),
    [
        (Words(), 5, "the assistant model has a vocabulary of 5 tokens, this model one of 4"),
        (Words({**WORDS, "b": 2, "a": 3}), 4, "another tokenizer: 'a' is token 3 there and 2 here"),
        (Words({"<s>": 0, "</s>": 1, "a": 2, "B": 3}), 4, "'B' is token 3 there and None here"),
        (Words({**WORDS, "<new>": 4}), 4, "'<new>' is token 4 there and None here"),
        (Words(bos_token_id=None), 4, "the assistant model has bos_token_id None, this model 0"),
        (Words(eos_token_id=2), 4, "the assistant model has eos_token_id 2, this model 1"),
        (None, 4, "the assistant model has no tokenizer to compare"),
    ],
)
def test_other_tables_are_refused(draft: Words | None, vocab: int, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        require_same_tokens(Words(), draft, 4, vocab)
    assert message in str(caught.value)


def test_a_target_without_a_tokenizer_cannot_be_compared() -> None:
    with pytest.raises(PromptError, match="this model has no tokenizer"):
        require_same_tokens(None, Words(), 4, 4)
