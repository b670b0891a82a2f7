"""Whether two models speak in the same tokens: a draft in other ones would be noise at best."""

from __future__ import annotations

from typing import Any

from ryzen_compile.errors import PromptError

SPECIAL = ("bos_token_id", "eos_token_id")


def require_same_tokens(target: Any, draft: Any, target_vocab: int, draft_vocab: int) -> None:
    """``PromptError`` unless the tokenizers ``target`` and ``draft`` (each with ``get_vocab``, or None) have the same
    text for every id, the same BOS and the same EOS, and both models logits for as many tokens."""
    hint = "draft with a model that was made with the same tokenizer"
    if target_vocab != draft_vocab:
        raise PromptError(
            f"the assistant model has a vocabulary of {draft_vocab} tokens, this model one of {target_vocab}", hint=hint
        )
    if target is None and draft is None:
        return  # both are spoken to in ids, and nothing says what these mean
    if target is None or draft is None:
        which = "this model" if target is None else "the assistant model"
        raise PromptError(f"{which} has no tokenizer to compare with the other one's", hint="load both with theirs")
    for which, tokenizer in (("this model", target), ("the assistant model", draft)):
        if not hasattr(tokenizer, "get_vocab"):
            raise PromptError(f"the tokenizer of {which} does not tell its vocabulary (get_vocab)", hint=hint)
    ours, theirs = target.get_vocab(), draft.get_vocab()
    if ours != theirs:
        text = min((text for text in {*ours, *theirs} if ours.get(text) != theirs.get(text)), key=_order(ours, theirs))
        raise PromptError(
            f"the assistant model has another tokenizer: {text!r} is token {theirs.get(text)} there and "
            f"{ours.get(text)} here",
            hint=hint,
        )
    for name in SPECIAL:
        here, there = getattr(target, name, None), getattr(draft, name, None)
        if here != there:
            raise PromptError(f"the assistant model has {name} {there}, this model {here}", hint=hint)


def _order(ours: dict[str, int], theirs: dict[str, int]) -> Any:
    """The difference of the lowest id is the one to show."""
    return lambda text: (min(ours.get(text, len(ours)), theirs.get(text, len(theirs))), text)
