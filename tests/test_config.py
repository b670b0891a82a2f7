"""Recipes: found by name, changed by field, refused with a line that says where."""

from __future__ import annotations

from typing import Any

import pytest

from ryzen_compile.cli.defaults import DEFAULT_RECIPE as SHOWN_RECIPE
from ryzen_compile.config import (
    DEFAULT_RECIPE,
    KV_BUDGETS,
    RECIPES,
    KVCacheConfig,
    Recipe,
    SparseActivations,
    TensorFormat,
    WeightQuantization,
    find_recipe,
    parse_kv,
    parse_overrides,
)
from ryzen_compile.errors import ConfigError
from ryzen_compile.numerics.blockwise import BITS, BLOCKS, BlockFormat
from ryzen_compile.numerics.search import METHODS


def test_the_default_is_a_recipe_and_the_one_that_help_shows() -> None:
    assert DEFAULT_RECIPE == SHOWN_RECIPE == RECIPES[0].name == "int4"
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)
    assert Recipe().weights is None  # bare settings change nothing


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_recipes_survive_json(recipe: Recipe) -> None:
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe == find_recipe(recipe.name)
    assert find_recipe(recipe) == recipe
    weights = recipe.weights
    if weights is not None:
        form = BlockFormat(weights.bits, weights.block, weights.symmetric)
        assert weights.target_bits is None or weights.target_bits > form.bits_per_weight


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", BLOCKS)
def test_settings_take_what_the_numerics_take(bits: Any, block: Any) -> None:
    """The configuration is read without torch, so its choices are written out there."""
    assert WeightQuantization(bits=bits, block=block).bits == bits


@pytest.mark.parametrize("method", METHODS)
def test_settings_take_every_method(method: Any) -> None:
    assert WeightQuantization(method=method).method == TensorFormat(method=method).method == method
    if METHODS[method].needs_statistics:
        with pytest.raises(ConfigError, match=r"weights\.fallback: .* a method that reads no text: rtn or mse"):
            find_recipe("int4", fallback={"method": method})
    else:
        assert find_recipe("int4", fallback={"method": method}).weights.fallback.block is None


def test_changes_go_to_the_recipe_or_to_its_weights() -> None:
    changed = find_recipe(
        "int4", context=64, logits="all", prefill="int8", target_bits=5.5, block=32, overrides={"mlp": {"bits": 8}}
    )
    assert (changed.name, changed.context, changed.logits, changed.prefill) == ("int4", 64, "all", "int8")
    assert changed.weights is not None
    assert (changed.weights.target_bits, changed.weights.block, changed.weights.bits) == (5.5, 32, 4)
    assert changed.weights.overrides == {"mlp": TensorFormat(bits=8)}
    assert find_recipe("int4", context=None, target_bits=None, overrides=None) == find_recipe("int4")
    assert find_recipe("int4").weights == RECIPES[0].weights  # what is found is not changed


def test_changes_to_a_changed_recipe_add_up() -> None:
    once = find_recipe("int8", overrides={"a": {"bits": 4}}, accuracy_level=0)
    twice = find_recipe(once, block=64)
    assert twice.weights is not None and twice.weights.block == 64 and twice.weights.accuracy_level == 0
    assert twice.weights.overrides == {"a": TensorFormat(bits=4)}


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        ("int3-mix", {}, "there is no recipe 'int3-mix'; did you mean 'int3-mixed'?"),
        ("int4-acurate", {}, "did you mean 'int4-accurate'?"),
        ("fp32", {"target_bits": 4.5}, "recipe 'fp32' keeps float32 weights, it has no target_bits; use int4 or int8"),
        ("fp32", {"overrides": {"x": {}}}, "recipe 'fp32' keeps float32 weights, it has no overrides; use int4"),
        ("fp32", {"prefill": "int8"}, "prefill 'int8' is a second form of integer weights"),
        ("int4", {"prefill": "int4"}, "recipe 'int4': prefill: Input should be 'shared' or 'int8', got 'int4'"),
        ("int4", {"target_bits": 1.5}, "recipe 'int4': weights.target_bits: Input should be greater than 2, got 1.5"),
        ("int4", {"target_bits": 9}, "recipe 'int4': weights.target_bits: Input should be less than 9, got 9"),
        ("int4", {"fallback": {"block": 64}}, "weights.fallback: Value error, expected a method that reads no text"),
        ("int4", {"bits": 5}, "recipe 'int4': weights.bits: Input should be 2, 3, 4 or 8, got 5"),
        ("int4", {"block": 100}, "recipe 'int4': weights.block: Input should be 16, 32, 64, 128 or 256, got 100"),
        ("int4", {"method": "awq"}, "weights.method: Input should be 'rtn', 'mse' or 'gptq', got 'awq'"),
        ("int4", {"max_kl": 0}, "weights.max_kl: Input should be greater than 0, got 0"),
        ("int4", {"accuracy_level": 2}, "weights.accuracy_level: Input should be 0 or 4, got 2"),
        ("int4", {"blok": 32}, "weights.blok: Extra inputs are not permitted, got 32"),
        ("int4", {"overrides": {"mlp": {"bit": 8}}}, "weights.overrides.mlp.bit: Extra inputs are not permitted"),
        ("int4", {"overrides": {"mlp": {"bits": 7}}}, "weights.overrides.mlp.bits: Input should be 2, 3, 4 or 8"),
        ("int4", {"overrides": {"a(b": {"bits": 8}}}, "'a(b' is not a regular expression: missing ), unterminated"),
    ],
)
def test_what_cannot_be_asked_for(recipe: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_recipe(recipe, **changes)
    assert said in str(caught.value)


def test_overrides_as_they_are_typed() -> None:
    assert parse_overrides(
        ["lm_head=8,block=32", "mlp=float", r"layers\.[01]\..*=bits=2, symmetric=false ,method=rtn", "down=4"]
    ) == {
        "lm_head": {"bits": 8, "block": 32},
        "mlp": {"float": True},
        r"layers\.[01]\..*": {"bits": 2, "symmetric": False, "method": "rtn"},
        "down": {"bits": 4},
    }
    assert parse_overrides([]) == {}
    assert list(parse_overrides(["b=8", "a=4", "b=2"]).items()) == [("a", {"bits": 4}), ("b", {"bits": 2})]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lm_head", "override 'lm_head': expected REGEX=SETTING; for example lm_head=8,block=32"),
        ("=8", "override '=8': expected REGEX=SETTING"),
        ("lm_head=", "override 'lm_head=': expected REGEX=SETTING"),
        ("a=eight", "override 'a=eight': expected a number, got 'eight'"),
        ("a=block=big", "expected a number, got 'big'"),
        ("a=8,", "override 'a=8,': expected a number, got ''"),
        ("a=-8", "expected a number, got '-8'"),
        ("a=symmetric=maybe", "'symmetric=maybe' is no setting; bits, block, symmetric=true|false, method, or float"),
        ("a=float=true", "'float=true' is no setting"),
        ("a=blok=32", "'blok=32' is no setting"),
    ],
)
def test_overrides_that_cannot_be_meant(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides([text])
    assert said in str(caught.value)


def test_an_override_that_is_given_again_wins() -> None:
    """The last that matches a weight wins, so the second of two equal expressions has to be the later one."""
    found = parse_overrides(["lm_head=8", ".*=2", "lm_head=4"])
    assert list(found)[-1] == "lm_head"


# --- the cache --------------------------------------------------------------------------------------------------------


def test_caches_are_floats_unless_asked_otherwise() -> None:
    assert {recipe.kv for recipe in RECIPES} == {KVCacheConfig()}
    assert (KVCacheConfig().dtype, KVCacheConfig().budget, KVCacheConfig().bounded) == ("fp32", 0.0, True)


@pytest.mark.parametrize(
    ("text", "formats"),
    [
        ("fp32", ("fp32", "fp32")),
        ("int8", ("int8", "int8")),
        ("int4", ("int4", "int4")),
        ("k8v4", ("int8", "int4")),
        ("auto", ("int4", "int4")),
        ("int8-g16", ("int8-g16", "int8-g16")),
        ("k8v4-g128", ("int8-g128", "int4-g128")),
    ],
)
def test_caches_by_name(text: str, formats: tuple[str, str]) -> None:
    kv = KVCacheConfig(**parse_kv(text))
    assert (str(kv), tuple(map(str, kv.formats))) == (text, formats)
    assert kv.budget == KV_BUDGETS[kv.dtype] and KVCacheConfig(dtype=kv.dtype, max_kl=0.3).budget == 0.3
    assert find_recipe("int4", kv=text).kv == find_recipe("int4", kv=kv).kv == kv
    assert find_recipe("int4", kv=text).weights == find_recipe("int4").weights
    assert KVCacheConfig.model_validate_json(kv.model_dump_json()) == kv


def test_fewer_bits_have_the_larger_budget() -> None:
    assert KV_BUDGETS["int8"] < KV_BUDGETS["k8v4"] < KV_BUDGETS["int4"]


def test_changes_to_a_cache() -> None:
    once = find_recipe("fp32", kv={"dtype": "int4", "max_kl": 0.5, "bounded": False})
    assert once.kv == KVCacheConfig(dtype="int4", max_kl=0.5, bounded=False)
    twice = find_recipe(once, kv="int8-g32", window=64)
    assert twice.kv == KVCacheConfig(dtype="int8", group=32, max_kl=0.5, bounded=False, window=64)
    assert find_recipe(twice, kv="k8v4").kv.group is None  # a name says both
    assert find_recipe(twice, sinks=0).kv.sinks == 0 and find_recipe(twice, window=None, kv=None).kv == twice.kv
    assert find_recipe(twice, kv=KVCacheConfig()).kv == KVCacheConfig()  # whole settings leave nothing of the old


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"kv": "int5"},
            "recipe 'int4': kv.dtype: Input should be 'fp32', 'int8', 'int4', 'k8v4' or 'auto', got 'int",
        ),
        ({"kv": ""}, "kv.dtype: Input should be 'fp32'"),
        ({"kv": "int8-g"}, "kv.group: Input should be 16, 32, 64 or 128, got ''"),
        ({"kv": "int8-g24"}, "kv.group: Input should be 16, 32, 64 or 128, got 24"),
        ({"kv": "int8-g-16"}, "kv.group: Input should be 16, 32, 64 or 128, got '-16'"),
        ({"kv": "int8-16"}, "kv.dtype: Input should be 'fp32', 'int8', 'int4', 'k8v4' or 'auto', got 'int8-16'"),
        ({"kv": "fp32-g32"}, "recipe 'int4': kv: Value error, a cache of dtype 'fp32' has no groups"),
        ({"kv": "auto-g32"}, "recipe 'int4': kv: Value error, a cache of dtype 'auto' has no groups"),
        ({"kv": {"type": "int8"}}, "kv.type: Extra inputs are not permitted, got 'int8'"),
        ({"kv": {"max_kl": 0}}, "kv.max_kl: Input should be greater than 0, got 0"),
        ({"kv": 8}, "kv: expected settings, a mapping or a name, got 8; for example int8 or int4-g32"),
        ({"kv": ["int8"]}, "kv: expected settings, a mapping or a name, got ['int8']"),
        ({"window": 15}, "kv.window: Input should be greater than or equal to 16, got 15"),
        ({"window": "wide"}, "kv.window: Input should be a valid integer"),
        ({"window": 32, "sinks": -1}, "kv.sinks: Input should be greater than or equal to 0, got -1"),
        ({"sinks": 9}, "sinks 9 belong to a window; give a window as well"),
    ],
)
def test_caches_that_cannot_be_asked_for(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_recipe("int4", **changes)
    assert said in str(caught.value)


@pytest.mark.parametrize("given", [0.5, {"target": 0.5}, SparseActivations()])
def test_sparsity_is_a_share_or_settings(given: Any) -> None:
    recipe = find_recipe("int4", sparsity=given)
    assert recipe.sparsity == SparseActivations(target=0.5)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert find_recipe(recipe, sparsity=0.25).sparsity == SparseActivations(target=0.25)
    assert find_recipe("int4").sparsity is None


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (0.96, r"sparsity\.target: .* less than or equal to 0\.95, got 0\.96"),
        (-0.1, r"sparsity\.target: .* greater than or equal to 0"),
        ({"target": 0.5, "method": "random"}, r"sparsity\.method"),
        ({"overrides": {"(": 0.5}}, r"sparsity\.overrides: .* is not a regular expression"),
        ({"overrides": {"mlp": 1.5}}, r"sparsity\.overrides\.mlp"),
        ({"share": 0.5}, r"sparsity\.share"),
    ],
)
def test_a_sparsity_that_is_none_is_refused_by_name(given: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        find_recipe("int4", sparsity=given)


def test_ternary_linears_read_every_channel() -> None:
    with pytest.raises(ConfigError, match="sparsity is for linears with other weights than ternary ones"):
        find_recipe("int4", ternary=True, sparsity=0.5)
    assert find_recipe("int4", ternary=True, sparsity=0).ternary
