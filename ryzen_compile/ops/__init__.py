"""The ``ryzen`` dialect: each operator is a schema, a plain PyTorch reference and a shape function.

Importing this package registers every operator exactly once. Kernels and lowerings attach to the operators from
outside; the references run anywhere and are the truth that everything else is tested against.

Shape letters: ``B`` batch, ``T`` new tokens, ``S`` cache capacity, ``H`` heads, ``K`` kv heads, ``D`` head dim,
``C`` model dim, ``F`` ffn dim, ``V`` vocab.
"""

from ryzen_compile.ops.activation import ACTIVATIONS, activate, activation, gated_activation
from ryzen_compile.ops.attention import attention, cached_attention
from ryzen_compile.ops.embedding import codebook_embedding, embedding_nbits
from ryzen_compile.ops.linear import gated_linear, linear_act, linear_nbits
from ryzen_compile.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from ryzen_compile.ops.rotary import rotary

__all__ = [
    "ACTIVATIONS",
    "activate",
    "activation",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "cached_attention",
    "codebook_embedding",
    "embedding_nbits",
    "gated_activation",
    "gated_linear",
    "layer_norm",
    "linear_act",
    "linear_nbits",
    "rms_norm",
    "rotary",
]
