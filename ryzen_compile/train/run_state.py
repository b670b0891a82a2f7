"""What a run has to remember to go on exactly: gathered into a snapshot, and put back.

Tensors of optimizers are named after the parameters that they belong to, so that a snapshot does not depend on the
order in which groups were made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ryzen_compile.errors import ModelError
from ryzen_compile.manifest import shown
from ryzen_compile.train.component import Component
from ryzen_compile.train.distributed import fill, gathered

RNG = "rng.cpu"


def parameter_names(model: nn.Module, components: Iterable[tuple[str, Sequence[nn.Parameter]]]) -> dict[int, str]:
    """Identity of every parameter of the model, and of those that components have beside it, to its name."""
    names = {id(p): f"model.{name}" for name, p in model.named_parameters()}
    for component, own in components:
        for index, parameter in enumerate(own):
            names.setdefault(id(parameter), f"{component}.{index}")
    return names


def own_parameters(
    names: Mapping[int, str], components: Iterable[tuple[str, Sequence[nn.Parameter]]]
) -> dict[str, nn.Parameter]:
    """Those of components that are not among the model's, by name."""
    return {
        names[id(parameter)]: parameter
        for component, own in components
        for parameter in own
        if names[id(parameter)].startswith(f"{component}.")
    }


def parts_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A snapshot's tensors beside the model's, by what they belong to: "optimizer" and "component"."""
    parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "component": {}}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind in parts:
            parts[kind][rest] = value
    return parts


def model_tensors(model: nn.Module, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's state, and parameters that components have beside it."""
    state = {f"model.{name}": gathered(value) for name, value in model.state_dict().items()}
    return state | {name: gathered(value) for name, value in extra.items()}


def restore_model(model: nn.Module, extra: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """The inverse. Raises ``ModelError`` for tensors that are missing, left over or of another shape."""
    targets = {f"model.{name}": value for name, value in model.state_dict().items()} | dict(extra)
    _expect_same("the model", set(targets), set(tensors))
    for name, target in targets.items():
        _fill(name, target, tensors[name])


def optimizer_tensors(
    optimizers: Sequence[torch.optim.Optimizer], names: Mapping[int, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, plain values) of all optimizers' states."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                name = f"{index}/{names[id(parameter)]}/{key}"
                if isinstance(value, Tensor):
                    tensors[name] = gathered(value)
                else:
                    values[name] = value
    return tensors, values


def restore_optimizers(
    optimizers: Sequence[torch.optim.Optimizer],
    names: Mapping[int, str],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
) -> None:
    """The inverse, into optimizers that have taken no step. Raises ``ModelError`` for states of unknown parameters, or
    of another shape."""
    parameters = {
        f"{index}/{names[id(p)]}": (group, optimizer.state[p], p)
        for index, optimizer in enumerate(optimizers)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for name, value in (*tensors.items(), *values.items()):
        owner, _, key = name.rpartition("/")
        if owner not in parameters:
            raise ModelError(f"the checkpoint holds an optimizer's state of {shown(owner)}, which is not trained here")
        group, state, parameter = parameters[owner]
        found = _like(parameter, name, value)
        if isinstance(found, Tensor) and (group.get("fused") or group.get("capturable")):
            found = found.to(parameter.device)  # counts of steps, too: these optimizers read them there
        state[key] = found


def random_state() -> dict[str, Tensor]:
    """Of the generators that dropout draws from."""
    state = {RNG: torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"rng.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_random_state(state: Mapping[str, Tensor]) -> None:
    """The inverse."""
    torch.set_rng_state(state[RNG])
    for i in range(torch.cuda.device_count()):
        if f"rng.cuda.{i}" in state:
            torch.cuda.set_rng_state(state[f"rng.cuda.{i}"], i)


def component_states(components: Iterable[Component]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, values) of all components, with whether each is on."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for component in components:
        own, facts = component.state()
        tensors |= {f"{component.name}/{key}": gathered(value) for key, value in own.items()}
        values[component.name] = {"active": component.active, "values": facts}
    return tensors, values


def restore_components(
    components: Iterable[Component], tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """The inverse. Raises ``ModelError`` for a component that the checkpoint does not know."""
    for component in components:
        if component.name not in values:
            raise ModelError(f"the checkpoint knows nothing of the component {component.name!r}")
        prefix = f"{component.name}/"
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        component.restore(own, values[component.name]["values"])


def _like(parameter: Tensor, name: str, value: Any) -> Any:
    """A state as the optimizer holds it: a number, such as its count of steps, or placed as its parameter is."""
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 0 and parameter.ndim:
        return value.clone()
    found = torch.empty_like(parameter, dtype=value.dtype)
    _fill(name, found, value)
    return found


def _fill(name: str, target: Tensor, value: Tensor) -> None:
    if target.shape != value.shape:
        raise ModelError(
            f"tensor {shown(name)} of the checkpoint is {tuple(value.shape)}, expected {tuple(target.shape)}",
            hint="was the configuration changed?",
        )
    fill(target, value)


def _expect_same(what: str, expected: set[str], found: set[str]) -> None:
    if expected == found:
        return
    missing, strange = sorted(expected - found), sorted(found - expected)
    raise ModelError(
        f"the checkpoint does not fit {what}: {len(missing)} tensor(s) missing{_first(missing)}, "
        f"{len(strange)} unknown{_first(strange)}",
        hint="was the configuration changed?",
    )


def _first(names: list[str]) -> str:
    return f" ({shown(names[0])})" if names else ""
