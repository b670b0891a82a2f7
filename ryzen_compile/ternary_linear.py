"""A linear layer as a BitNet checkpoint stores it: codes of -1, 0 and +1, a scale, activations of 8 bits."""

from __future__ import annotations

from torch import Tensor, nn

from ryzen_compile import ops


class TernaryLinear(nn.Module):
    """``norm(x)`` (..., C) rounded row by row, times the codes, times the scale, plus the bias: (..., N).

    ``packed`` (N, ceil(C / 4)) uint8 and ``scale`` () float32 are those of ``ryzen::linear_ternary``, which it emits
    when it is captured. ``norm``, and ``bias`` (N,) float32, may be none.
    """

    def __init__(self, packed: Tensor, scale: Tensor, bias: Tensor | None, norm: nn.Module | None) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.norm = norm
        self.packed: Tensor
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = ops.linear_ternary(x if self.norm is None else self.norm(x), self.packed, self.scale)
        return product if self.bias is None else product + self.bias
