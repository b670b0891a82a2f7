"""What callers say of speculation, in our words and in transformers'."""

from __future__ import annotations

from typing import Any

import pytest

from ryzen_compile.errors import PromptError
from ryzen_compile.runtime.speculative.settings import Speculation, read_speculation
from ryzen_compile.runtime.speculative.suffix import Corpus


def test_nothing_asked_for_is_none() -> None:
    assert read_speculation(None, {}, {}) is None
    assert read_speculation(False, {}, {"prompt_lookup_num_tokens": 5}) is None
    assert read_speculation(None, {"assistant_model": None, "prompt_lookup_num_tokens": None}, {}) is None
    # Configs carry these where nobody speculates.
    assert read_speculation(None, {}, {"num_assistant_tokens": 20, "assistant_confidence_threshold": 0.4}) is None


@pytest.mark.parametrize("said", ["auto", True])
def test_auto_takes_what_is_there_and_goes_without(said: object) -> None:
    settings = read_speculation(said, {}, {})
    assert settings == Speculation(required=False) and settings.drafters is None
    assert settings.wants("lookup", unasked=True) and not settings.wants("early_exit", unasked=False)


def test_transformers_names_choose_their_drafters() -> None:
    lookup = read_speculation(None, {"prompt_lookup_num_tokens": 7, "max_matching_ngram_size": 2}, {})
    assert lookup == Speculation(drafters=("lookup",), tokens=7, ngram=2)
    exits = read_speculation(None, {"assistant_early_exit": 4, "num_assistant_tokens": 3}, {})
    assert exits == Speculation(drafters=("early_exit",), exit_layers=4, tokens=3)
    model = object()
    draft = read_speculation(None, {"assistant_model": model, "assistant_confidence_threshold": 0.7}, {})
    assert draft == Speculation(drafters=("draft_model",), threshold=0.7)
    both = read_speculation(None, {"assistant_model": model, "prompt_lookup_num_tokens": 5}, {})
    assert both is not None and both.drafters == ("lookup", "draft_model")


def test_arguments_come_before_the_config_and_a_lookups_number_before_the_assistants() -> None:
    config = {"prompt_lookup_num_tokens": 4, "num_assistant_tokens": 20}
    assert read_speculation(None, {}, config) == Speculation(drafters=("lookup",), tokens=4)
    assert read_speculation(None, {"prompt_lookup_num_tokens": 9}, config) == Speculation(
        drafters=("lookup",), tokens=9
    )
    assert read_speculation(None, {"num_assistant_tokens": 2}, config) == Speculation(drafters=("lookup",), tokens=2)


def test_names_adjust_a_speculation() -> None:
    own = Speculation(drafters=("suffix",), corpus=Corpus([[1, 2, 3]]), fixed=True)
    found = read_speculation(own, {"num_assistant_tokens": 5}, {})
    assert found is not None and found.tokens == 5 and found.fixed and found.drafters == ("suffix",)
    assert read_speculation(own, {}, {"num_assistant_tokens": 20, "assistant_confidence_threshold": 0.9}) == own
    auto = read_speculation("auto", {}, {"num_assistant_tokens": 20})
    assert auto == Speculation(tokens=20, required=False)


@pytest.mark.parametrize(
    ("speculation", "arguments", "message"),
    [
        ("always", {}, "speculation must be None, True, False, 'auto' or a Speculation, got 'always'"),
        (3, {}, "speculation must be"),
        (False, {"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens belongs to speculation"),
        (None, {"num_assistant_tokens": 3}, "num_assistant_tokens belongs to speculation"),
        (None, {"assistant_confidence_threshold": 0.3}, "belongs to speculation"),
        (None, {"prompt_lookup_num_tokens": 0}, "tokens of a draft must be an integer from 1 to 64, got 0"),
        (None, {"prompt_lookup_num_tokens": 10**6}, "from 1 to 64, got 1000000"),
        (None, {"prompt_lookup_num_tokens": 2.0}, "from 1 to 64, got 2.0"),
        (None, {"prompt_lookup_num_tokens": True}, "from 1 to 64, got True"),
        ("auto", {"num_assistant_tokens": -1}, "from 1 to 64, got -1"),
        ("auto", {"max_matching_ngram_size": 0}, "ngram must be an integer from 1 to 16"),
        (None, {"assistant_early_exit": 0}, "exit_layers must be an integer from 1"),
        ("auto", {"assistant_confidence_threshold": 1.5}, "threshold must be a probability from 0 to 1, got 1.5"),
        ("auto", {"assistant_confidence_threshold": "high"}, "threshold must be"),
    ],
)
def test_what_means_nothing_is_refused(speculation: object, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError) as caught:
        read_speculation(speculation, arguments, {})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drafters": ("lookup", "oracle")}, "drafters are lookup, suffix, early_exit, draft_model"),
        ({"drafters": ()}, "drafters are lookup"),
        ({"corpus": [[1, 2]]}, "corpus must be a Corpus, got list"),
        ({"threshold": float("nan")}, "threshold must be"),
        ({"tokens": 65}, "from 1 to 64"),
    ],
)
def test_a_speculation_checks_itself(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError) as caught:
        Speculation(**settings)
    assert message in str(caught.value)
