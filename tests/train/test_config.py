"""A run's settings: what is read, what is refused and how it is named, and what may change before a run goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from ryzen_compile.errors import ConfigError
from ryzen_compile.settings import MAX_CONFIG_BYTES
from ryzen_compile.train.config import (
    COMPONENTS,
    FREE_SETTINGS,
    PassSettings,
    TrainConfig,
    changed_settings,
    json_schema,
    parse_config,
    read_config,
)

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
EXAMPLES = sorted(path for path in CONFIGS.glob("*.yaml") if not path.name.startswith("workflow"))
# The least that a run needs.
LEAST = """
output: out
model: {path: somewhere}
data: {train: {path: text.txt}}
optimization: {steps: 10}
"""
# Every section once.
ALL = """
output: out
model: {tokenizer: {vocab: 300}, architecture: {model_type: llama}}
data: {train: {path: a.txt}, validation: {path: b.txt}}
optimization: {epochs: 2}
schedule: {kind: wsd}
precision: {dtype: bf16}
passes:
  qat: {bits: [8, 4]}
  dkm: {bits: [4]}
  distill: {teacher: there}
controller: {every: 5}
metrics: {every: 2}
checkpoint: {every: 5}
validation: {every: 5}
early_stopping: {patience: 2}
"""


def write(directory: Path, text: str | bytes) -> Path:
    path = directory / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def sections(kind: type[BaseModel] = TrainConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """(dotted path, names of settings) of every section of the tree."""
    yield ".".join(path), list(kind.model_fields)
    for name, field in kind.model_fields.items():
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from sections(inner, (*path, name))


SECTIONS = dict(sections())


# --- reading ----------------------------------------------------------------------------------------------------------
def test_the_least_and_the_whole_tree(tmp_path: Path) -> None:
    least = read_config(write(tmp_path, LEAST))
    assert least.model.path == "somewhere" and least.optimization.steps == 10
    assert least.passes == PassSettings() and least.early_stopping is None
    whole = read_config(write(tmp_path, ALL))
    assert whole.passes.qat is not None and whole.passes.qat.bits == (8, 4)
    assert whole.passes.ternary is None and whole.early_stopping is not None


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_can_be_read(path: Path) -> None:
    """And say how they are started, from the root of the repository, where their own paths begin."""
    config = read_config(path)
    text = path.read_text(encoding="utf-8")
    assert f"ryzen-compile train --config examples/configs/{path.name}" in text
    assert config.output.startswith("runs/")
    assert parse_config(config.model_dump(mode="json")) == config


def test_there_is_an_example_of_each_component() -> None:
    used = {name for path in EXAMPLES for name in COMPONENTS if getattr(read_config(path).passes, name) is not None}
    assert used >= {"qat", "ternary", "dkm", "distill"}


def test_a_configuration_cannot_be_changed(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, LEAST))
    with pytest.raises(ValidationError, match="frozen"):
        config.optimization.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-3", 1e-3), ("1E3", 1000.0), ("3.0e-3", 3e-3), ("-1e-3", -1e-3), ("+2e+1", 20.0), ("1_0e2", 1000.0)],
)
def test_numbers_with_exponents(tmp_path: Path, text: str, number: float) -> None:
    """YAML 1.1 would take most of these for text."""
    path = write(tmp_path, LEAST.replace("steps: 10", f"steps: 10, lr: {text}"))
    if number > 0:
        assert read_config(path).optimization.lr == number
    else:
        with pytest.raises(ConfigError, match=r"optimization.lr: Input should be greater than 0, got '-0.001'"):
            read_config(path)


def test_text_that_only_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    text = LEAST.replace("somewhere", "'1e3'").replace("output: out", "output: 1e3x")
    config = read_config(write(tmp_path, text))
    assert (config.model.path, config.output) == ("1e3", "1e3x")


# --- unknown names ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_name_at_any_level_is_refused_with_the_nearest(tmp_path: Path, section: str) -> None:
    tree = yaml.safe_load(ALL)
    if section == "passes.ternary":
        tree["passes"] = {"ternary": {}}
    place = tree
    for key in section.split(".") if section else ():
        place = place.setdefault(key, {})
    name = SECTIONS[section][0]
    typo = name[:-1] + "_" + name[-1]
    place[typo] = 1
    where = f"{section}.{typo}".lstrip(".")
    with pytest.raises(ConfigError) as caught:
        read_config(write(tmp_path, yaml.safe_dump(tree)))
    message = str(caught.value)
    assert f": {where}: " in message and f"the nearest is {name!r}" in message and "run.yaml" in message
    assert "\n" not in message


def test_a_name_like_no_other_has_no_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"xyzzy: there is no such setting$"):
        read_config(write(tmp_path, LEAST + "xyzzy: 1\n"))


@pytest.mark.parametrize("key", ["1", "null", "2024-01-01", "true"])
def test_a_name_that_is_no_text(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read_config(write(tmp_path, LEAST + f"{key}: 1\n"))


# --- values -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimization.steps=0", "optimization.steps: Input should be greater than or equal to 1, got '0'"),
        ("optimization.steps=many", "optimization.steps: .*integer.*, got 'many'"),
        ("optimization.steps=2.5", "optimization.steps: .*integer"),
        ("optimization.lr=.nan", "optimization.lr: "),
        ("optimization.lr=.inf", "optimization.lr: "),
        ("optimization.lrs=[1]", "optimization.lrs: there is no such setting, the nearest is 'lr'"),
        ("optimization.lr=[1]", r"optimization.lr: .*number, got '\[1\]'"),
        ("optimization.betas=[0.9]", "optimization.betas"),
        ("optimization.betas=[0.9, 2]", r"optimization.betas.1: .*less than or equal to 1"),
        ("optimization.optimizer=sgd", "optimization.optimizer: Input should be 'adamw' or 'muon', got 'sgd'"),
        ("optimization.tokens=100", "expected exactly one of tokens, epochs and steps"),
        ("optimization.steps=null", "expected exactly one of tokens, epochs and steps"),
        ("optimization=3", "optimization: .*, got '3'"),
        ("optimization=null", "optimization: "),
        ("model.architecture={model_type: llama}", "model: expected either a path or an architecture"),
        ("model.path=null", "model: expected either a path or an architecture"),
        ("model={architecture: {hidden_size: 8}, tokenizer: there}", "architecture: expected a model_type"),
        ("model={architecture: {model_type: llama}}", "a new model needs a tokenizer"),
        ("model.tokenizer={vocab: 100}", r"model\.tokenizer\.vocab: .*257, got '100'"),
        ("data.train.dataset=c4", "data.train: expected either a path or a dataset"),
        ("data.train={}", "data.train: expected either a path or a dataset"),
        ("data={train: {path: a}, validation: {path: b}, hold_out: [c]}", "validation and hold_out"),
        ("data.length=1", "data.length: .*2, got '1'"),
        ("data.train.include=x.txt", "data.train.include: "),
        ("passes={qat: {}, ternary: {}}", "passes: qat and ternary both round the linears"),
        ("passes={lora: {}, ternary: {}}", "passes: lora trains updates of frozen weights"),
        ("passes={lora: {}, qat: {}}", "passes: lora trains updates of frozen weights"),
        ("passes.qat.bits=[4, 8]", "passes.qat: bits: expected stages, widest first"),
        ("passes.qat.bits=[4, 4]", "passes.qat: bits: expected stages, widest first"),
        ("passes.qat.bits=[]", "passes.qat: bits: expected stages"),
        ("passes.qat.bits=[5]", "passes.qat.bits.0: "),
        ("passes.qat.block=7", "passes.qat.block: "),
        ("passes.distill={}", "passes.distill.teacher: Field required$"),
        ("passes.distill={teacher: t, weight: 1.5}", "passes.distill.weight: "),
        ("schedule.kind=step", "schedule.kind: "),
        ("seed=-1", "seed: "),
        ("seed=4294967296", "seed: "),
        ("save_dtype=int8", "save_dtype: "),
        ("output=null", "output: "),
    ],
)
def test_values_that_cannot_be(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(write(tmp_path, LEAST), [change])
    assert "\n" not in str(caught.value) and "run.yaml" in str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    for name in ("output", "model", "data", "optimization"):
        tree = {key: value for key, value in yaml.safe_load(LEAST).items() if key != name}
        with pytest.raises(ConfigError, match=f"{name}: Field required$"):
            read_config(write(tmp_path, yaml.safe_dump(tree)))


# --- single settings --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("optimization.lr=1e-3", 1e-3),
        ("optimization.lr = 2", 2.0),
        ("optimization.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("data.hold_out=[a.py, 'b=c.py']", ("a.py", "b=c.py")),
        ("data.hold_out=[]", ()),
        ("data.train.path=/tmp/a=b.txt", "/tmp/a=b.txt"),
        ("passes.qat.head_bits=null", None),
        ("passes.qat.bits=[8,4,2]", (8, 4, 2)),
        ("passes.distill.teacher=there", "there"),
        ("precision.compile=false", False),
        ("early_stopping.patience=7", 7),
        ("output=elsewhere", "elsewhere"),
    ],
)
def test_one_setting_is_replaced(tmp_path: Path, change: str, value: Any) -> None:
    """Sections on the way to it are made where they are missing."""
    found: Any = read_config(write(tmp_path, LEAST), [change])
    for key in change.partition("=")[0].strip().split("."):
        found = getattr(found, key)
    assert found == value and type(found) is type(value)


def test_changes_apply_in_their_order(tmp_path: Path) -> None:
    path = write(tmp_path, LEAST)
    assert read_config(path, ["seed=1", "seed=2"]).seed == 2
    config = read_config(path, ["optimization.steps=null", "optimization.tokens=1000"])
    assert (config.optimization.steps, config.optimization.tokens) == (None, 1000)
    config = read_config(path, ["passes.qat={bits: [8]}", "passes.qat.block=32"])
    assert config.passes.qat is not None and (config.passes.qat.bits, config.passes.qat.block) == ((8,), 32)
    config = read_config(path, ["passes.qat={bits: [8]}", "passes.qat=null", "passes.ternary={}"])
    assert config.passes.qat is None and config.passes.ternary is not None


@pytest.mark.parametrize("change", ["", "=", "seed", "=3", ".=3", "a..b=3", "optimization.=3", " =3", "a. .b=1"])
def test_changes_that_are_none(tmp_path: Path, change: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a\.b=value"):
        read_config(write(tmp_path, LEAST), [change])


@pytest.mark.parametrize("value", ["[1", "{a: b", "'x", "a: b: c", "&x *y", "!!python/object:os.system x"])
def test_changes_whose_value_is_no_yaml(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match="is no YAML value"):
        read_config(write(tmp_path, LEAST), [f"seed={value}"])


@pytest.mark.parametrize("change", ["output.name=3", "optimization.steps.most=3"])
def test_a_change_below_a_value(tmp_path: Path, change: str) -> None:
    with pytest.raises(ConfigError, match="expected settings"):
        read_config(write(tmp_path, LEAST), [change])


def test_an_unknown_name_in_a_change(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimization\.step: there is no such setting, the nearest is 'steps'"):
        read_config(write(tmp_path, LEAST), ["optimization.step=3"])


# --- files ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds a NoneType, expected settings"),
        ("- a\n- b\n", "holds a list, expected settings"),
        ("just words", "holds a str, expected settings"),
        ("42", "holds a int, expected settings"),
        ("output: out\n\tmodel: x\n", "is no YAML"),
        ("output: [a", "is no YAML"),
        ("output: a\n---\noutput: b\n", "is no YAML"),
        ("output: !!python/object/apply:os.system [ls]\n", "is no YAML"),
        (b"output: \xff\xfe\xff\n", "is no YAML"),
        (b"output: a\x00b\n", "is no YAML"),
        ("? [a, b]\n: 1\n", "run.yaml"),
        ("? {a: b}\n: 1\n", "is no YAML"),
        ("output: &x [*x]\n", "more than 100000 values"),
        ("seed: 2024-13-45\n", "is no YAML"),
    ],
)
def test_files_that_hold_no_settings(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(write(tmp_path, text))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


def test_a_name_given_twice(tmp_path: Path) -> None:
    """The last would win silently."""
    with pytest.raises(ConfigError, match=r"seed.* is given twice in .* line 2"):
        read_config(write(tmp_path, "seed: 1\nseed: 2\n" + LEAST))


def test_a_bomb_of_references_goes_off_nowhere(tmp_path: Path) -> None:
    """Nine levels of nine references are 10^9 values, for who spells them out, as messages and checkpoints would."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    bomb = "{" + ", ".join(levels) + "}"
    with pytest.raises(ConfigError, match="more than 100000 values"):
        read_config(write(tmp_path, LEAST + f"x: {bomb}\n"))
    with pytest.raises(ConfigError, match="is no YAML value"):
        read_config(write(tmp_path, LEAST), [f"model.architecture={bomb}"])


def test_a_reference_is_what_it_refers_to(tmp_path: Path) -> None:
    text = LEAST.replace("{train: {path: text.txt}}", "{train: &t {path: text.txt}, validation: {<<: *t, split: test}}")
    data = read_config(write(tmp_path, text)).data
    assert data.validation is not None and (data.validation.path, data.validation.split) == ("text.txt", "test")


def test_deep_nesting(tmp_path: Path) -> None:
    deep = "[" * 1500 + "]" * 1500
    with pytest.raises(ConfigError, match=r"run\.yaml.*nested too deeply"):
        read_config(write(tmp_path, f"output: {deep}"))
    with pytest.raises(ConfigError, match="is no YAML value"):
        read_config(write(tmp_path, LEAST), [f"output={deep}"])


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    filler = "#" * 99 + "\n"
    fits = LEAST + filler * ((MAX_CONFIG_BYTES - len(LEAST)) // 100)
    assert read_config(write(tmp_path, fits)).output == "out"
    with pytest.raises(ConfigError, match=f"is larger than {MAX_CONFIG_BYTES} bytes"):
        read_config(write(tmp_path, fits + filler))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml.* cannot be read: No such file"):
        read_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_config(tmp_path)


# --- schema -----------------------------------------------------------------------------------------------------------
def test_the_schema_knows_every_setting_and_no_other() -> None:
    schema = json_schema()
    assert schema["$schema"].endswith("2020-12/schema")
    assert set(schema["properties"]) == set(TrainConfig.model_fields)
    assert set(schema["required"]) == {"output", "model", "data", "optimization"}
    objects = [schema, *schema["$defs"].values()]
    assert {tuple(part["properties"]) for part in objects} == {tuple(names) for names in SECTIONS.values()}
    assert all(part["additionalProperties"] is False for part in objects)


def allowed(value: Any, schema: Any, root: dict[str, Any]) -> bool:
    """Whether ``value`` fits ``schema``: the part of JSON Schema that settings need."""
    if "$ref" in schema:
        return allowed(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return any(allowed(value, option, root) for option in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kind = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
            "null": type(None)}.get(schema.get("type"), object)  # fmt: skip
    if not isinstance(value, kind) or (isinstance(value, bool) and schema.get("type") in ("integer", "number")):
        return False
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        return set(schema.get("required", ())) <= set(value) <= set(known) and all(
            allowed(inner, known[name], root) for name, inner in value.items()
        )
    if isinstance(value, list):
        items = schema.get("prefixItems") or [schema.get("items", {})] * len(value)
        return len(items) == len(value) and all(allowed(*pair, root) for pair in zip(value, items, strict=True))
    return not isinstance(value, (int, float)) or (
        value >= schema.get("minimum", value)
        and value <= schema.get("maximum", value)
        and not value <= schema.get("exclusiveMinimum", value - 1)
        and not value >= schema.get("exclusiveMaximum", value + 1)
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_schema_allows_the_examples(path: Path) -> None:
    """In the form that a run writes down: with every default spelled out."""
    schema = json_schema()
    dumped = read_config(path).model_dump(mode="json")
    assert allowed(dumped, schema, schema)
    for broken in ({"sed": 1}, {"seed": -1}, {"seed": "1"}, {"output": None}, {"schedule": {"kind": "step"}}):
        assert not allowed(dumped | broken, schema, schema)


# --- going on ---------------------------------------------------------------------------------------------------------
def test_nothing_changed() -> None:
    config = parse_config(yaml.safe_load(ALL))
    assert changed_settings(config.model_dump(mode="json"), config) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimization.lr=1", "optimization.lr was 0.0003, now 1.0"),
        ("optimization.betas=[0.8, 0.95]", r"optimization.betas was \[0.9, 0.95\], now \[0.8, 0.95\]"),
        ("model.architecture.hidden_size=8", "model.architecture.hidden_size was None, now 8"),
        ("passes.qat=null", "passes.qat was "),
        ("passes.dkm.bits=[4, 3]", r"passes.dkm.bits was \[4\], now \[4, 3\]"),
        ("data.train.path=c.txt", "data.train.path was 'a.txt', now 'c.txt'"),
        ("controller.every=6", "controller.every was 5, now 6"),
        ("early_stopping=null", "early_stopping was "),
    ],
)
def test_changes_that_make_another_run(tmp_path: Path, change: str, message: str) -> None:
    before = read_config(write(tmp_path, ALL)).model_dump(mode="json")
    (found,) = changed_settings(before, read_config(write(tmp_path, ALL), [change]))
    assert re.match(message, found)


def test_what_is_only_written_down_may_change(tmp_path: Path) -> None:
    before = read_config(write(tmp_path, LEAST)).model_dump(mode="json")
    changes = ["output=other", "metrics.every=9", "checkpoint.every=9", "save_dtype=fp16"]
    assert {change.partition("=")[0].partition(".")[0] for change in changes} == set(FREE_SETTINGS)
    assert changed_settings(before, read_config(write(tmp_path, LEAST), changes)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("save_dtype=fp16", "passes.qat needs save_dtype fp32"),
        ("validation.every=0", "early_stopping needs validation.every above 0"),
        ("checkpoint.best=false", "early_stopping needs validation.every above 0, and checkpoint.best"),
    ],
)
def test_sections_that_do_not_fit_together(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(write(tmp_path, ALL), [change])


def test_every_difference_is_told(tmp_path: Path) -> None:
    before = read_config(write(tmp_path, ALL)).model_dump(mode="json")
    now = read_config(write(tmp_path, ALL), ["seed=3", "data.length=7", "passes.distill.weight=0.3"])
    assert [found.partition(" was ")[0] for found in changed_settings(before, now)] == [
        "seed",
        "data.length",
        "passes.distill.weight",
    ]
