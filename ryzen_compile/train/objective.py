"""What a step minimises, as one module over rows of tokens: the model, its loss, and the levers that make it faster.

A lever changes how the loss is computed, not what it is (but for rounding): the precision of products, the loss without
the batch's logits, compiled code. Each can be switched while training. The loss without logits reads the model's
hidden states and its head's weight; whether that is all there is to the model's logits is asked once, on real rows, so
models that scale, cap or shift their logits are found out by what they compute.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ryzen_compile.train.depths import Depths
from ryzen_compile.train.fused import FusedBackbone
from ryzen_compile.train.token_loss import Teaching, TokenLoss, token_loss

AGREEMENT = 1e-3  # of two passes over the same rows, in float32
LOUD = 64.0  # a new model's logits are so small that a soft cap would not show


@dataclass(frozen=True)
class Levers:
    """``dtype`` of products (float32: no autocast); ``linear_cross_entropy``: never all logits; ``compiled`` code;
    fused ``operators`` in place of the model's body, which go with ``linear_cross_entropy``."""

    dtype: torch.dtype = torch.float32
    linear_cross_entropy: bool = False
    compiled: bool = False
    operators: bool = False


@dataclass(frozen=True)
class Teacher:
    """A frozen model, its weight in the loss, and the temperature of both predictions."""

    model: nn.Module
    weight: float
    temperature: float


class Objective(nn.Module):
    """``forward(rows (B, T + 1) int64) -> TokenLoss``: each token of a row predicts the next one.

    ``model`` is a transformers causal LM, and the only submodule: its parameters are this module's. With ``depths`` the
    loss is a weighted mean of that and of the losses of the first channels of hidden states and head, which are the
    text's alone; it needs logits that are their product.
    """

    def __init__(self, model: nn.Module, levers: Levers, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self.levers = levers
        self._hidden: dict[str, Any] = {}  # not submodules: the teacher is not trained, compiled code is the model's
        self._hidden["teacher"] = teacher
        self.depths: Depths | None = None

    @property
    def channels(self) -> int:
        """C, of the vectors that depths cut."""
        return int(self.head.shape[1])

    @property
    def head(self) -> Tensor:
        """(V, C), the weight that logits are a product with."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def teacher(self) -> Teacher | None:
        """Whom it learns from, if from anybody; may be switched off and on."""
        found: Teacher | None = self._hidden["teacher"]
        return found

    @teacher.setter
    def teacher(self, teacher: Teacher | None) -> None:
        self._hidden["teacher"] = teacher

    @property
    def exact_levers(self) -> Levers:
        """Float32, by the same way through the head."""
        return replace(self.levers, dtype=torch.float32, compiled=False, operators=False)

    def fuse(self, device: torch.device) -> None:
        """Makes the lever ``operators`` possible; the model is on the CPU, and will be on ``device``.

        Raises as ``FusedBackbone`` does.
        """
        self._hidden["fused"] = FusedBackbone(self.model).to(device)

    def forward(self, rows: Tensor) -> TokenLoss:
        """See the class."""
        ids, labels = rows[:, :-1], rows[:, 1:].reshape(-1)
        with torch.autocast(rows.device.type, dtype=self.levers.dtype, enabled=self.levers.dtype != torch.float32):
            if self.levers.linear_cross_entropy:
                return self._from_hidden(ids, labels)
            return self._from_logits(ids, labels)

    @torch.no_grad()
    def logits_are_a_product(self, rows: Tensor) -> bool:
        """Whether the loss without logits is the model's own, and its teacher's, on ``rows`` (B, T + 1), in float32."""
        models = [self.model] if self.teacher is None else [self.model, self.teacher.model]
        return all(self._is_product(model, rows[:1]) for model in models)

    @staticmethod
    def _is_product(model: Any, rows: Tensor) -> bool:
        """Products are multiplied by ``LOUD`` as they leave the head: a model that does something to them behind it, be
        it a cap that bends only large ones, gives other logits than these."""
        head: Any = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
            return False
        products: list[Tensor] = []
        read: list[Tensor] = []

        def loud(_module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            read.append(args[0])
            products.append(out * LOUD)
            return products[-1]

        training = model.training
        model.eval()  # dropout would make any two passes differ
        hook = head.register_forward_hook(loud)
        try:
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
            hidden = getattr(model.base_model(input_ids=rows[:, :-1], use_cache=False), "last_hidden_state", None)
        finally:
            hook.remove()
            model.train(training)
        if hidden is None or len(products) != 1 or hidden.shape != read[0].shape:
            return False
        return torch.equal(logits, products[0]) and torch.allclose(hidden, read[0], rtol=AGREEMENT, atol=AGREEMENT)

    def hidden(self, ids: Tensor) -> Tensor:
        """(B, T, C), what the head reads."""
        if self.levers.operators:
            found: Tensor = self._hidden["fused"](ids, self.levers.dtype, compiled=self.levers.compiled)
            return found
        backbone = self._backbone(self.levers.compiled)
        states: Tensor = backbone(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def _from_hidden(self, ids: Tensor, labels: Tensor) -> TokenLoss:
        hidden, head = self.hidden(ids).flatten(0, 1).to(self.levers.dtype), self.head
        teaching = None
        if self.teacher is not None:
            taught: Any = self.teacher.model
            with torch.no_grad():
                theirs = taught.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
            theirs_head = taught.get_output_embeddings().weight.detach()
            teaching = Teaching(
                theirs.to(self.levers.dtype), theirs_head, self.teacher.weight, self.teacher.temperature
            )
        whole = token_loss(hidden, head, labels, teaching)
        if self.depths is None:
            return whole
        return self.depths.joined(whole, lambda dim: token_loss(hidden[:, :dim], head[:, :dim], labels).loss)

    def _from_logits(self, ids: Tensor, labels: Tensor) -> TokenLoss:
        if self.depths is None:
            model = self._compiled_model() if self.levers.compiled else self.model
            return self._of_logits(self._logits(model, ids).flatten(0, 1), ids, labels)
        hidden, head = self.hidden(ids).flatten(0, 1), self.head
        whole = self._of_logits(functional.linear(hidden, head).float(), ids, labels)
        return self.depths.joined(
            whole,
            lambda dim: functional.cross_entropy(functional.linear(hidden[:, :dim], head[:, :dim]).float(), labels),
        )

    def _of_logits(self, logits: Tensor, ids: Tensor, labels: Tensor) -> TokenLoss:
        text = functional.cross_entropy(logits, labels)
        guess = logits.detach().argmax(-1)
        correct, agreed = (guess == labels).sum(), labels.new_zeros(())
        if self.teacher is None:
            return TokenLoss(text, text.detach(), correct, agreed)
        heat, weight = self.teacher.temperature, self.teacher.weight
        with torch.no_grad():
            theirs = self._logits(self.teacher.model, ids).flatten(0, 1)
        divergence = functional.kl_div(
            (logits / heat).log_softmax(-1), (theirs / heat).log_softmax(-1), reduction="sum", log_target=True
        ) / len(labels)
        loss = (1 - weight) * text + weight * heat * heat * divergence
        return TokenLoss(loss, text.detach(), correct, (guess == theirs.argmax(-1)).sum())

    @staticmethod
    def _logits(model: Any, ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits.float()

    def _backbone(self, compiled: bool) -> Any:
        return self._compiled("backbone", self.model.base_model) if compiled else self.model.base_model

    def _compiled_model(self) -> Any:
        return self._compiled("model", self.model)

    def _compiled(self, name: str, module: nn.Module) -> Any:
        if name not in self._hidden:
            self._hidden[name] = torch.compile(module)
        return self._hidden[name]


def compiler_works() -> str:
    """Why ``torch.compile`` cannot be used here; empty if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(lambda x: (x * 2).sin())(torch.ones(8))
    except Exception as error:  # noqa: BLE001 - whatever a toolchain raises; it is the answer
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


def fast_half(device: torch.device) -> bool:
    """Whether products in bfloat16 are computed by instructions of their own on ``device``."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capability.get("avx512_bf16") or capability.get("amx_bf16") or capability.get("avx512_bf16_vl"))
