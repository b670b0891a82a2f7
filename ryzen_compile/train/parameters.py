"""Which parameters of a model its products and lookups read as matrices, and how other values stand in for them.

The export's own passes are asked, so that what is trained for is what is exported: a parameter is found by what the
graph does with it, whatever module owns it. While something stands in for a parameter (``torch.nn.utils.parametrize``)
the ``Parameter`` object stays the one that it was, shared where it was shared; only its name is longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ryzen_compile.capture import capture
from ryzen_compile.config import WeightQuantization
from ryzen_compile.errors import ConfigError, UnsupportedError, UsageError
from ryzen_compile.numerics.blockwise import BlockFormat
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.weight_targets import Target, choose_formats, find_targets
from ryzen_compile.program import is_call
from ryzen_compile.train.distributed import gathered

aten = torch.ops.aten
FLOAT_BYTES = 4


@dataclass(frozen=True, eq=False)
class Place:
    """An attribute of a module that is a parameter; ``name`` is the module's."""

    name: str
    module: nn.Module
    attribute: str

    @property
    def tensor(self) -> Tensor:
        """The parameter as it is now, whatever stands in for it."""
        owner: Any = self.module
        if parametrize.is_parametrized(owner, self.attribute):
            found: Tensor = owner.parametrizations[self.attribute].original
        else:
            found = getattr(owner, self.attribute)
        return found


@dataclass(frozen=True, eq=False)
class Matrix:
    """A parameter that the export takes for a matrix (N, C), C being the channels that a product sums over.

    The parameter itself is (C, N) where ``transposed``. There are several ``places`` where it is tied. ``target`` says
    what reads it.
    """

    name: str
    places: tuple[Place, ...]
    transposed: bool
    target: Target

    @property
    def tensor(self) -> Tensor:
        return self.places[0].tensor

    @property
    def rows(self) -> Tensor:
        """(N, C), without a gradient; of a sharded parameter all, so that every process has to ask."""
        whole = gathered(self.tensor)
        return whole.t() if self.transposed else whole


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer: its module's name, the module, its weight."""

    name: str
    module: nn.Module
    weight: Matrix


def find_matrices(model: nn.Module) -> list[Matrix]:
    """Every parameter that the export may store in integer blocks, in the order in which the graph reads them.

    ``model`` is captured (on the CPU, float32; that takes seconds) and left as it was. Raises ``CaptureError`` where
    that fails, ``UnsupportedError`` for a weight that is computed from parameters otherwise than by a transpose, and
    ``UsageError`` for a parameter that something stands in for already.
    """
    program = Canonicalize().run(capture(model)).program
    tensors = dict(model.named_buffers(remove_duplicate=False)) | dict(model.named_parameters(remove_duplicate=False))
    places = _places(model)
    found = []
    for target in find_targets(program)[0]:
        source, transposed = _source(target)
        name = program.weight_names[source.name]
        owners = tuple(places[id(tensors[name])])
        if any(isinstance(place.module, parametrize.ParametrizationList) for place in owners):
            raise UsageError(f"something stands in for {name} already", hint="detach it first")
        found.append(Matrix(name, owners, transposed, target))
    return found


def find_layers(model: nn.Module) -> tuple[list[Layer], list[Matrix]]:
    """The linear layers, and all matrices that are none: the head, tables, and weights that several layers share.

    A layer is an ``nn.Linear`` or its transposed twin, ``Conv1D`` of transformers. Raises ``ConfigError`` if there is
    none, and what ``find_matrices`` raises.
    """
    from transformers.pytorch_utils import Conv1D

    layers, others = [], []
    for matrix in find_matrices(model):
        place, target = matrix.places[0], matrix.target
        alone = len(matrix.places) == len(target.linears) == 1 and not target.lookups and not target.is_head
        if alone and place.attribute == "weight" and isinstance(place.module, (nn.Linear, Conv1D)):
            layers.append(Layer(place.name, place.module, matrix))
        else:
            others.append(matrix)
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no linear layers beside its head")
    return layers, others


def export_formats(matrices: Sequence[Matrix], settings: WeightQuantization) -> list[BlockFormat]:
    """What an export with ``settings``, which override nothing, stores each of ``matrices`` in."""
    choices = choose_formats([matrix.target for matrix in matrices], settings)
    return [choices[matrix.target].format for matrix in matrices]


def float_bytes(model: nn.Module) -> int:
    """Of all parameters in float32, each counted once."""
    return FLOAT_BYTES * sum(parameter.numel() for parameter in model.parameters())


def stand_in(matrix: Matrix, parametrization: nn.Module) -> None:
    """From now on, whoever reads the parameter gets ``parametrization(parameter)``, of the same shape and type."""
    for place in matrix.places:
        parametrize.register_parametrization(place.module, place.attribute, parametrization)


def standing_in(model: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[nn.Module, str, Any]]:
    """(module, attribute, parametrization) wherever one of ``kind`` stands in for a parameter."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            chains: Any = module.parametrizations
            for attribute, chain in list(chains.items()):
                if isinstance(chain[0], kind):
                    yield module, attribute, chain[0]


def give_back(module: nn.Module, attribute: str) -> None:
    """The inverse of ``stand_in`` at one place: the parameter as it is now, under the name that it had."""
    chains: Any = module.parametrizations
    if len(chains) > 1:
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
        return
    # The library's own way takes the class apart, which copies of the module share.
    original = chains[attribute].original
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    if isinstance(original, nn.Parameter):
        module.register_parameter(attribute, original)
    else:
        module.register_buffer(attribute, original)


def straight_through(latent: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function(latent)``, of the same shape and type, to the bit where ``latent`` is finite; its gradient is passed
    on to ``latent`` as it is (Bengio et al., 2013)."""
    fixed = latent.detach()
    return function(fixed) + (latent - fixed)  # a difference of exactly zero, whose gradient is one


def _source(target: Target) -> tuple[fx.Node, bool]:
    """The one parameter that the target's weight is, and whether it is read transposed."""
    weight = target.weight
    if weight.op == "placeholder":
        return weight, False
    inner = weight.args[0] if weight.args else None
    if is_call(weight, aten.permute) and isinstance(inner, fx.Node) and inner.op == "placeholder":
        return inner, True  # of a matrix: there is no other permutation
    raise UnsupportedError(
        f"a product reads {weight.name}, which is computed from {', '.join(target.names)}; expected a parameter or its "
        "transpose",
        hint="give each product a parameter of its own",
    )


def _places(model: nn.Module) -> dict[int, list[Place]]:
    """By the identity of each parameter and buffer."""
    found: dict[int, list[Place]] = {}
    for name, module in model.named_modules():
        for attribute, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            found.setdefault(id(tensor), []).append(Place(name, module, attribute))
    return found
