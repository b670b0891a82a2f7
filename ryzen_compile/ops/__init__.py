"""The ``ryzen`` dialect: each operator is a schema, a plain PyTorch reference and a shape function.

Importing this package registers every operator exactly once. Kernels and lowerings attach to the operators from
outside; the references run anywhere and are the truth that everything else is tested against.

Shape letters: ``B`` batch, ``T`` new tokens, ``S`` cache capacity, ``H`` heads, ``K`` kv heads, ``D`` head dim,
``C`` model dim, ``F`` ffn dim, ``V`` vocab.
"""

from ryzen_compile.ops.activation import (
    ACTIVATIONS,
    activate,
    activation,
    activation_backward,
    gated_activation,
    gated_activation_backward,
)
from ryzen_compile.ops.attention import attention, cached_attention, cached_attention_inplace
from ryzen_compile.ops.attention_backward import attention_backward
from ryzen_compile.ops.embedding import codebook_embedding, embedding_nbits
from ryzen_compile.ops.linear import gated_linear, linear_act, linear_nbits, linear_nbits_backward, linear_ternary
from ryzen_compile.ops.loss import (
    linear_cross_entropy,
    linear_cross_entropy_backward,
    linear_cross_entropy_grads,
)
from ryzen_compile.ops.norm import (
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from ryzen_compile.ops.rotary import rotary
from ryzen_compile.ops.sparsity import sparsify, sparsify_topk

__all__ = [
    "ACTIVATIONS",
    "activate",
    "activation",
    "activation_backward",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_backward",
    "cached_attention",
    "cached_attention_inplace",
    "codebook_embedding",
    "embedding_nbits",
    "gated_activation",
    "gated_activation_backward",
    "gated_linear",
    "layer_norm",
    "layer_norm_backward",
    "linear_act",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "linear_cross_entropy_grads",
    "linear_nbits",
    "linear_nbits_backward",
    "linear_ternary",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
    "sparsify",
    "sparsify_topk",
]
