"""Which parameters of a model its products and lookups read as matrices, and how other values stand in for them.

The export's own passes are asked, so that what is trained for is what is exported: a parameter is found by what the
graph does with it, whatever module owns it. While something stands in for a parameter (``torch.nn.utils.parametrize``)
the ``Parameter`` object stays the one that it was, shared where it was shared; only its name is longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ryzen_compile.capture import capture
from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.weight_targets import Target, find_targets
from ryzen_compile.program import Program, is_call

aten = torch.ops.aten
Place = tuple[nn.Module, str]


@dataclass(frozen=True, eq=False)
class Matrix:
    """A parameter that the export stores as a matrix (N, C), C being the channels that a product sums over.

    ``tensor`` is (C, N) where ``transposed``. ``places`` are the modules that own it, by the attributes it has there:
    several where it is tied. ``in_product``: a linear reads it; ``looked_up``: tokens are looked up in it; ``is_head``:
    it gives logits.
    """

    name: str
    tensor: Tensor
    places: tuple[Place, ...]
    transposed: bool
    in_product: bool
    looked_up: bool
    is_head: bool

    @property
    def rows(self) -> Tensor:
        """(N, C), without a gradient."""
        return self.tensor.detach().t() if self.transposed else self.tensor.detach()


def find_matrices(model: nn.Module) -> list[Matrix]:
    """Every parameter whose values the export may store in integer blocks, in the order in which the graph reads them.

    ``model`` is captured (on the CPU, float32; seconds) and left as it was. Raises ``CaptureError`` for one that cannot
    be, ``UnsupportedError`` for a weight that is computed from parameters otherwise than by a transpose, and
    ``UsageError`` for a parameter that something stands in for already.
    """
    program = Canonicalize().run(capture(model)).program
    owned = _places(model)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    found = []
    for target in find_targets(program)[0]:
        source, transposed = _source(target)
        name = program.weight_names[source.name]
        tensor = tensors[name]
        places = tuple(owned.get(id(tensor), ()))
        if any(isinstance(module, parametrize.ParametrizationList) for module, _ in places):
            raise UsageError(f"something stands in for {name} already", hint="detach it first")
        in_product, looked_up = bool(target.linears), bool(target.lookups)
        found.append(Matrix(name, tensor, places, transposed, in_product, looked_up, target.is_head))
    return found


def find_linears(model: nn.Module) -> tuple[list[tuple[str, nn.Module, Matrix]], list[Matrix]]:
    """The linear layers, as (name, module, weight), and all other matrices.

    A layer is an ``nn.Linear`` or a transposed one (``transformers``' ``Conv1D``); the head is none, nor is a linear
    whose weight is looked up or used by several layers. Raises as ``find_matrices`` does.
    """
    from transformers.pytorch_utils import Conv1D

    names = {module: name for name, module in model.named_modules()}
    linears, others = [], []
    for matrix in find_matrices(model):
        owners = [module for module, attribute in matrix.places if attribute == "weight"]
        plain = matrix.in_product and not matrix.looked_up and not matrix.is_head
        if plain and len(matrix.places) == len(owners) == 1 and isinstance(owners[0], (nn.Linear, Conv1D)):
            linears.append((names[owners[0]], owners[0], matrix))
        else:
            others.append(matrix)
    return linears, others


def stand_in(matrix: Matrix, parametrization: nn.Module) -> None:
    """From now on, whoever reads the parameter gets ``parametrization(parameter)``, of the same shape and type."""
    for module, attribute in matrix.places:
        parametrize.register_parametrization(module, attribute, parametrization)


def standing_in(model: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[nn.Module, str, Any]]:
    """(module, attribute, parametrization) wherever one of ``kind`` stands in for a parameter."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for attribute, (first, *_) in list(module.parametrizations.items()):  # type: ignore[union-attr]
                if isinstance(first, kind):
                    yield module, attribute, first


def give_back(module: nn.Module, attribute: str) -> None:
    """Undoes ``stand_in`` at one place: the parameter is what it is now, under its name and in no other order."""
    parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
    for table in (module._parameters, module._buffers):
        if attribute in table and attribute == "weight":
            table.move_to_end(attribute, last=False) if hasattr(table, "move_to_end") else None


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(latent)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(latent: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function(latent)``, of the same shape, with the gradient of ``latent`` itself (Bengio et al., 2013)."""
    result: Tensor = _StraightThrough.apply(latent, function)
    return result


def _source(target: Target) -> tuple[fx.Node, bool]:
    """The one parameter that the target's weight is, and whether it is read transposed."""
    weight = target.weight
    if weight.op == "placeholder":
        return weight, False
    if is_call(weight, aten.permute) and list(weight.args[1]) == [1, 0] and weight.args[0].op == "placeholder":
        return weight.args[0], True
    raise UnsupportedError(
        f"a product reads {weight.name}, which is computed from {', '.join(target.names)}; expected a parameter or its "
        "transpose",
        hint="give each product a parameter of its own",
    )


def _places(model: nn.Module) -> dict[int, list[Place]]:
    found: dict[int, list[Place]] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for attribute, tensor in table.items():
                if tensor is not None:
                    found.setdefault(id(tensor), []).append((module, attribute))
    return found
