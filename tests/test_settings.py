"""Trees of settings that are nobody's in particular: sections in sections, kinds of which one fits, many of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ryzen_compile.errors import ConfigError
from ryzen_compile.settings import Section, changed_settings, parse_settings, read_settings, settings_schema


class Rim(Section):
    width: float = Field(default=19.0, gt=0)
    material: Literal["steel", "carbon"] = "steel"


class Wheel(Section):
    """A section in a section, which every other place below refers to."""

    spokes: int = Field(default=32, ge=0)
    rim: Rim = Rim()


class Motor(Section):
    watts: int = 250


class Gears(Section):
    """Checked as a whole: pydantic then names the check where it names the kind."""

    front: int = 1
    rear: int = 11

    @model_validator(mode="after")
    def _more_behind(self) -> Gears:
        if self.rear < self.front:
            raise ValueError("expected at least as many behind as in front")
        return self


class Foreign(BaseModel):
    """Another library's model, which is no ``Section``."""

    model_config = ConfigDict(extra="forbid")

    brand: str = "none"


class Bicycle(Section):
    name: str
    front: Wheel = Wheel()
    rear: Wheel | None = None
    drive: str | Gears | None = None
    power: Motor | Rim | None = None
    spare: tuple[Wheel, ...] = ()
    bags: Mapping[str, Wheel] | None = None
    bell: Foreign | None = None
    colors: Mapping[str, Any] = Field(default_factory=dict)


LEAST: dict[str, Any] = {"name": "b"}


def changed(*changes: str, tree: Mapping[str, Any] = LEAST) -> Bicycle:
    return changed_settings(Bicycle, tree, changes)


# --- changes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ((), {}),
        (("name=7a",), {"name": "7a"}),
        (("front.rim.width=23.5",), {"front": {"rim": {"width": 23.5}}}),
        (("front.rim.width=1e1", "front.rim.material=carbon"), {"front": {"rim": {"width": 10, "material": "carbon"}}}),
        (("rear.spokes=28",), {"rear": {"spokes": 28}}),
        (("rear={}",), {"rear": {}}),
        (("rear.spokes=28", "rear=null"), {"rear": None}),
        (("drive=belt",), {"drive": "belt"}),
        (("drive.rear=12",), {"drive": {"rear": 12}}),
        (("drive=belt", "drive={front: 2}"), {"drive": {"front": 2}}),
        (("power.watts=500",), {"power": {"watts": 500}}),
        (("power.material=steel",), {"power": {"material": "steel"}}),
        (("spare=[{spokes: 24}, {}]",), {"spare": ({"spokes": 24}, {})}),
        (("bags.left.spokes=3",), {"bags": {"left": {"spokes": 3}}}),
        (("colors.frame.hue=red",), {"colors": {"frame": {"hue": "red"}}}),
        (("bell.brand=x",), {"bell": {"brand": "x"}}),
    ],
)
def test_changes(changes: tuple[str, ...], wanted: dict[str, Any]) -> None:
    """Sections on the way are made where they are missing, in the kind that fits."""
    assert changed(*changes) == Bicycle(**{**LEAST, **wanted})


def test_the_kind_that_fits_is_chosen() -> None:
    assert isinstance(changed("power.watts=500").power, Motor)
    assert isinstance(changed("power.width=20").power, Rim)
    assert isinstance(changed("drive.front=2").drive, Gears)


def test_a_change_leaves_what_it_was_given_as_it_is() -> None:
    """Two commands may begin with the same defaults."""
    tree = {"name": "b", "front": {"rim": {"width": 20}}, "colors": {}}
    before = {"name": "b", "front": {"rim": {"width": 20}}, "colors": {}}
    first = changed("front.rim.width=30", "rear.spokes=8", "colors.a=1", tree=tree)
    assert first.front.rim.width == 30 and tree == before
    assert changed(tree=tree) == Bicycle(**before)


def test_a_file_and_its_changes_are_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "bicycle.yaml"
    path.write_text("name: b\nfront: {rim: {width: 20}}\n")
    changes = ["front.rim.material=carbon", "drive.rear=12"]
    tree = {"name": "b", "front": {"rim": {"width": 20}}}
    assert read_settings(Bicycle, path, changes) == changed(*changes, tree=tree)
    assert read_settings(Bicycle, path) == parse_settings(Bicycle, tree) == changed(tree=tree)


def test_settings_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        changed().front.rim.width = 3.0  # type: ignore[misc]


# --- faults -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nmae=x", "nmae: there is no such setting, the nearest is 'name'"),
        ("front.spoke=3", "front.spoke: there is no such setting, the nearest is 'spokes'"),
        ("front.rim.widht=3", "front.rim.widht: there is no such setting, the nearest is 'width'"),
        ("rear.rim.materiel=carbon", "rear.rim.materiel: there is no such setting, the nearest is 'material'"),
        ("drive.raer=3", "drive.raer: there is no such setting, the nearest is 'rear'"),
        ("power.wats=3", "power.wats: there is no such setting, the nearest is 'watts'"),
        ("power.widht=3", "power.widht: there is no such setting, the nearest is 'width'"),
        ("spare=[{}, {spoks: 3}]", "spare.1.spoks: there is no such setting, the nearest is 'spokes'"),
        ("bags.left.rim.widht=3", "bags.left.rim.widht: there is no such setting, the nearest is 'width'"),
        ("bell.brnad=3", "bell.brnad: there is no such setting, the nearest is 'brand'"),
        ("front.xyzzy=3", "front.xyzzy: there is no such setting"),
        ("front.watts=3", "front.watts: there is no such setting"),  # of another section
    ],
)
def test_unknown_names_are_answered_with_the_nearest_of_their_section(change: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(change)
    assert str(caught.value) == f"configuration: {message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("front.rim.width=0", "front.rim.width: Input should be greater than 0, got '0'"),
        ("front.rim.width=.nan", "front.rim.width: Input should be a finite number, got 'nan'"),
        ("front.rim=3", "front.rim: "),
        ("front=null", "front: "),
        ("drive={front: 3, rear: 2}", "drive: expected at least as many behind as in front"),
        (
            "drive.front=many",
            "drive.front: Input should be a valid integer, unable to parse string as an integer, got ",
        ),
        ("spare=[{rim: {material: wood}}]", "spare.0.rim.material: Input should be 'steel' or 'carbon', got 'wood'"),
        ("name=null", "name: Input should be a valid string, got 'None'"),
    ],
)
def test_values_that_cannot_be_are_named_by_their_place(change: str, message: str) -> None:
    """Not by the kinds that were tried for it."""
    with pytest.raises(ConfigError) as caught:
        changed(change)
    assert str(caught.value).startswith(f"configuration: {message}")
    assert "function-" not in str(caught.value) and "Gears" not in str(caught.value)


def test_where_settings_came_from_is_said(tmp_path: Path) -> None:
    path = tmp_path / "bicycle.yaml"
    path.write_text("name: b\nfront: {spoke: 3}\n")
    with pytest.raises(ConfigError, match=r"bicycle\.yaml'?: front\.spoke: "):
        read_settings(Bicycle, path)
    with pytest.raises(ConfigError, match=r"^the defaults: front\.spoke: "):
        parse_settings(Bicycle, {"name": "b", "front": {"spoke": 3}}, "the defaults")
    with pytest.raises(ConfigError, match=r"^configuration: name: Field required$"):
        changed(tree={})


@pytest.mark.parametrize("change", ["name.first=x", "front.rim.width.most=3", "spare.0.spokes=3"])
def test_a_change_below_a_value(change: str) -> None:
    with pytest.raises(ConfigError, match="expected settings"):
        changed(change, tree={"name": "b", "front": {"rim": {"width": 3}}, "spare": [{}]})


# --- schema -----------------------------------------------------------------------------------------------------------
def test_the_schema_has_every_section() -> None:
    schema = settings_schema(Bicycle)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["$defs"]) == {"Rim", "Wheel", "Motor", "Gears", "Foreign"}
    assert schema["required"] == ["name"] and schema["additionalProperties"] is False
