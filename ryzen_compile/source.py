"""Where a model comes from: a local directory or a hub id, checked before anything of it is loaded.

A model directory is untrusted input. It may hold code (``auto_map``, pickles), lie about sizes, or lack tensors that
transformers would silently fill with random numbers; each of these is refused here, by name, before the rest of the
package sees a model. It knows nothing of graphs or passes.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.bitnet_checkpoint import BitNet, find_bitnet, is_packed, make_ternary
from ryzen_compile.errors import ModelError, ResourceError, UnsafeError, UnsupportedError, UsageError
from ryzen_compile.manifest import name_fault, shown, shown_path
from ryzen_compile.quantized_checkpoint import KEY as QUANTIZATION_KEY
from ryzen_compile.quantized_checkpoint import Quantization, find_quantization, read_weights
from ryzen_compile.safetensors_header import MAX_TENSORS, TensorEntry, check_safetensors

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ryzen_compile.numerics.blockwise import BlockTensor

MAX_JSON_BYTES = 64 << 20
# Configured counts that loops or allocations follow; the limits are far above any model and far below harm.
CONFIG_LIMITS = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 10_000),
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "max_position_embeddings"), 100_000_000),
    "vocab_size": 100_000_000,
}
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
_HUB_SKIP = ("*/*.safetensors", "consolidated*.safetensors")  # second copies of the weights
_PICKLES = (".bin", ".pt", ".pt2", ".pth", ".pkl", ".ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_CODE_CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class SourceFiles:
    """An inspected model directory: its ``config.json`` and the weight files, with the tensors their headers list.

    ``quantization`` says how the weights are stored when they are integers that can be repacked, or ternary.
    """

    directory: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    tensors: dict[str, TensorEntry]
    quantization: Quantization | BitNet | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode and what came with it.

    ``blocks`` holds the weights that the checkpoint stores as integers, by the name of the parameter, which has their
    dequantized values. Names that share a parameter share an entry's blocks. Empty for a model in floating point, and
    for one of ternary linears, which are layers of their own (``TernaryLinear``).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    generation_config: GenerationConfig | None
    blocks: Mapping[str, BlockTensor]


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """The local directory of ``model``: itself, or a hub id's snapshot (downloaded unless cached or offline).

    Only safetensors, JSON, tokenizer and Jinja files are fetched, and Python files if ``trust_remote_code``. The hub
    library reads HF_HUB_OFFLINE itself. Raises ModelError when there is no such directory, id or cached snapshot,
    ResourceError when it cannot be stored.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(
            f"model {shown_path(model)} is a file, expected a directory", hint="give the directory it is in"
        )
    name = str(model)
    if isinstance(model, Path) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise ModelError(f"model directory {shown_path(model)} does not exist", hint="check the path")
    import huggingface_hub as hub
    from huggingface_hub import errors

    patterns = [*_HUB_FILES, "*.py"] if trust_remote_code else list(_HUB_FILES)
    try:
        snapshot = hub.snapshot_download(
            name,
            revision=revision,
            local_files_only=bool(local_files_only),
            token=token,
            allow_patterns=patterns,
            ignore_patterns=list(_HUB_SKIP),
        )
    except (errors.EntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"model {shown(name)} is neither a local directory nor in the hub cache, and the hub was not reached",
            hint="check the name, go online (HF_HUB_OFFLINE unset), or give a local directory",
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.RevisionResolutionError) as error:
        raise ModelError(
            f"model {shown(name)} is not a local directory and the hub refused it: {_first_line(error)}",
            hint="check the name and revision; a gated model needs a token",
        ) from error
    except OSError as error:
        raise ResourceError(f"cannot fetch model {shown(name)}: {_first_line(error)}") from error
    return Path(snapshot)


def inspect(directory: str | Path, *, trust_remote_code: bool = False) -> SourceFiles:
    """Checks a model directory without loading it: configuration, remote code, weight files and their headers.

    Raises ModelError for what is missing or damaged, UnsafeError for pickles, paths that leave the directory, and
    (unless ``trust_remote_code``) configurations that name code, UnsupportedError for weights quantized in a way that
    cannot be repacked.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ModelError(f"model directory {shown_path(directory)} does not exist", hint="check the path")
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"{shown_path(directory)} holds no config.json", hint="expected a Hugging Face model directory"
        )
    if (directory / "adapter_config.json").exists():
        # transformers would follow its base_model_name_or_path, to the hub if need be
        raise ModelError(f"{shown_path(directory)} is a PEFT adapter", hint="merge it into its base model first")
    config = read_json(directory / "config.json")
    if not trust_remote_code:
        refuse_code(directory)
    check_config(config)
    quantization = find_bitnet(config) or find_quantization(config)
    tensors: dict[str, TensorEntry] = {}
    home: dict[str, str] = {}
    weights, index = _weight_files(directory)
    for path in weights:
        for name, entry in check_safetensors(path).items():
            if name in tensors:
                raise ModelError(f"tensor {shown(name)} is in two files: {shown(home[name])} and {shown(path.name)}")
            tensors[name], home[name] = entry, path.name
    strays = sorted(name for name, shard in index.items() if home.get(name) != shard)
    if strays:
        raise ModelError(f"the index places {len(strays)} tensor(s) in files that lack them: {_first_ten(strays)}")
    if len(tensors) > MAX_TENSORS:
        raise ModelError(f"{shown_path(directory)} has {len(tensors)} tensors, the limit is {MAX_TENSORS}")
    return SourceFiles(directory, config, tuple(weights), tensors, quantization)


def load_model(
    directory: str | Path, *, dtype: str = "float32", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, GenerationConfig | None]:
    """``load_checkpoint`` for who does not ask how the weights were stored."""
    loaded = load_checkpoint(directory, dtype=dtype, trust_remote_code=trust_remote_code)
    return loaded.model, loaded.tokenizer, loaded.generation_config


def load_checkpoint(directory: str | Path, *, dtype: str = "float32", trust_remote_code: bool = False) -> LoadedModel:
    """The model in eval mode with weights of ``dtype``, its tokenizer if there is one, its generation defaults.

    ``dtype`` is float32, float16 or bfloat16; quantized weights are dequantized exactly, which takes float32, and kept
    as they are in ``blocks`` beside. Raises whatever ``inspect`` raises, and ModelError for tensors missing, left over
    or of another shape (transformers would fill or drop them silently), declared ties that differ, NaN or infinite
    weights, and a tokenizer larger than the vocabulary.
    """
    if dtype not in ("float32", "float16", "bfloat16"):
        raise UsageError(f"dtype {shown(dtype)}: expected float32, float16 or bfloat16")
    files = inspect(directory, trust_remote_code=trust_remote_code)
    blocks: Mapping[str, BlockTensor] = {}
    if files.quantization is None:
        model = _load_floats(files.directory, dtype, trust_remote_code)
    elif dtype != "float32":
        raise UsageError(f"dtype {shown(dtype)}: quantized weights are loaded as float32, which holds them exactly")
    elif isinstance(files.quantization, BitNet):
        model = _load_ternary(files, files.quantization, trust_remote_code)
    else:
        model, blocks = _load_quantized(files, files.quantization, trust_remote_code)
    check_ties(model)
    check_finite(model)
    tokenizer = load_tokenizer(files.directory, model, trust_remote_code)
    return LoadedModel(model.eval(), tokenizer, model.generation_config if model.can_generate() else None, blocks)


def _load_floats(
    directory: Path, dtype: str, trust_remote_code: bool, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """The directory's model, or that of another ``config`` over its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with loading("model", directory):
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported in `info`, with every shape, instead of raised one by one
        )
    check_loading_info(info)
    return model


def _load_ternary(files: SourceFiles, bitnet: BitNet, trust_remote_code: bool) -> PreTrainedModel:
    """The model over ternary linears. Bytes stay bytes while transformers loads them, whatever its layer for them."""
    import torch
    from transformers import AutoConfig

    with loading("configuration", files.directory):
        config = AutoConfig.from_pretrained(files.directory, local_files_only=True, trust_remote_code=trust_remote_code)
    if is_packed(bitnet, files.tensors):
        config.quantization_config = {**config.quantization_config, "linear_class": "bitlinear"}
    with torch.compiler.set_stance("force_eager"):  # it would compile how it unpacks
        model = _load_floats(files.directory, "float32", trust_remote_code, config)
    make_ternary(model, bitnet)
    _forget_quantization(model.config)
    return model


def _load_quantized(
    files: SourceFiles, quantization: Quantization, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, BlockTensor]]:
    """The model over dequantized weights, built as if its configuration had never spoken of quantization."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with loading("configuration", files.directory):
        config = AutoConfig.from_pretrained(files.directory, local_files_only=True, trust_remote_code=trust_remote_code)
        _forget_quantization(config)
        with torch.device("meta"):  # only to learn the class, remote code included
            kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    weights, blocks = read_weights(quantization, files.weights, files.tensors)
    with loading("model", files.directory):
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        _adopt_generation_config(model, files.directory)
    _check_owners(model, blocks)
    check_loading_info(_without_empty_biases(info, weights, blocks))
    return model, _placed(model, weights, blocks)


def _forget_quantization(config: PretrainedConfig) -> None:
    """Removes what the checkpoint's configuration and its parts say of quantization: the model is one in float32."""
    for part in (config, *vars(config).values()):
        if hasattr(part, QUANTIZATION_KEY) and not isinstance(part, dict):
            delattr(part, QUANTIZATION_KEY)


def _adopt_generation_config(model: PreTrainedModel, directory: Path) -> None:
    """Loading from a state dict leaves the defaults that the configuration implies; the file knows better."""
    from transformers import GenerationConfig

    if model.can_generate() and (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)


def _check_owners(model: PreTrainedModel, blocks: Mapping[str, BlockTensor]) -> None:
    """Integers are stored (outputs, inputs), as linears and embeddings hold their weights; GPT-2's Conv1D does not."""
    from torch import nn

    modules = dict(model.named_modules())
    for name in blocks:
        module = modules.get(name.removesuffix(".weight"))
        if module is not None and not isinstance(module, (nn.Linear, nn.Embedding)):
            raise UnsupportedError(
                f"{shown(name)} is quantized and belongs to a {type(module).__name__}, expected a Linear or Embedding",
                hint="save the model dequantized and quantize it here",
            )


def _without_empty_biases(
    info: Mapping[str, Any], weights: Mapping[str, Tensor], blocks: Mapping[str, BlockTensor]
) -> dict[str, Any]:
    """``info`` without the zeros that some GPTQ writers store as the bias of linears that have none."""
    biases = {name.removesuffix("weight") + "bias" for name in blocks}
    empty = {name for name in biases if name in weights and not bool(weights[name].any())}
    return {**info, "unexpected_keys": set(info["unexpected_keys"]) - empty}


def _placed(
    model: PreTrainedModel, weights: Mapping[str, Tensor], blocks: Mapping[str, BlockTensor]
) -> dict[str, BlockTensor]:
    """``blocks`` by the name of the parameter that holds their values.

    A parameter is known by its memory, so that it does not matter how transformers renamed the checkpoint's tensors.
    What it joined into one tensor, such as a layer's experts, has no blocks and stays in float32, with a warning; that
    must not befall a linear, which would be quantized a second time.
    """
    from torch import nn

    origins = {weights[name].data_ptr(): name for name in blocks}
    placed = {}
    used = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        origin = origins.get(parameter.data_ptr())
        if origin is not None and parameter.shape == weights[origin].shape:
            placed[name] = blocks[origin]
            used.add(origin)
    lost = sorted(blocks.keys() - used)
    if not lost:
        return placed
    floats = {tensor.untyped_storage().data_ptr() for name, tensor in weights.items() if name not in blocks}
    for name, module in model.named_modules():
        plain = isinstance(module, (nn.Linear, nn.Embedding)) and f"{name}.weight" not in placed
        if plain and module.weight.untyped_storage().data_ptr() not in floats:
            raise UnsupportedError(
                f"{shown(name + '.weight')} is put together by transformers from several tensors, of which "
                f"{len(lost)} are quantized: {_first_ten(lost)}",
                hint="save the model dequantized and quantize it here",
            )
    warnings.warn(
        f"{len(lost)} quantized tensor(s) were joined into parameters that are no linears and are kept in float32: "
        f"{_first_ten(lost)}",
        stacklevel=4,
    )
    return placed


def check_finite(model: nn.Module) -> None:
    """Raises ModelError naming the first parameter that holds NaN or Inf, with how many values and parameters do."""
    import torch

    bad: list[tuple[str, int]] = []
    for name, tensor in model.named_parameters():
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        # The extremes carry any NaN or Inf and allocate nothing; the count is only taken of a tensor that has some.
        low, high = torch.aminmax(tensor.detach())
        if not math.isfinite(low.item()) or not math.isfinite(high.item()):
            bad.append((name, int((~torch.isfinite(tensor.detach())).sum())))
    if bad:
        name, count = bad[0]
        raise ModelError(
            f"tensor {shown(name)} holds {count} NaN or infinite value(s); {len(bad)} tensor(s) are affected",
            hint="the weights are damaged or overflowed in their dtype",
        )


class loading:  # noqa: N801 - reads as a statement: ``with loading("model", directory):``
    """Rewords what transformers raises for an unusable directory as ModelError, on one line."""

    def __init__(self, what: str, directory: Path) -> None:
        self.what, self.directory = what, directory

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and "allocate memory" in str(error):
            raise ResourceError(f"not enough memory for {shown_path(self.directory)}: {_first_line(error)}") from error
        if isinstance(error, (ValueError, OSError, KeyError, TypeError, AttributeError, RuntimeError, ImportError)):
            raise ModelError(
                f"transformers cannot load the {self.what} in {shown_path(self.directory)}: {_first_line(error)}"
            ) from error


def load_tokenizer(directory: Path, model: PreTrainedModel, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model's directory, None where there is none. Raises ModelError for one of another model."""
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    with loading("tokenizer", directory):
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    vocab = model.get_input_embeddings().num_embeddings
    specials = {
        role: number
        for role in ("bos", "eos", "pad", "unk")
        if (number := getattr(tokenizer, f"{role}_token_id", None)) is not None
    }
    if outside := [f"{role}_token_id {number}" for role, number in specials.items() if not 0 <= number < vocab]:
        raise ModelError(f"tokenizer's {outside[0]} is outside the model's vocabulary of {vocab}")
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= vocab}
    ordinary = [number for number in beyond if not _is_special(tokenizer, number)]
    if ordinary:
        raise ModelError(
            f"tokenizer knows {max(beyond) + 1} tokens, the model's vocabulary has {vocab}",
            hint="the tokenizer belongs to another model",
        )
    if beyond:  # Gemma 3's text models ship the image token of their siblings: harmless until a prompt contains it
        names = ", ".join(shown(token) for token in list(beyond.values())[:10])
        warnings.warn(
            f"{len(beyond)} special token(s) lie outside the model's vocabulary of {vocab}: {names}", stacklevel=3
        )
    return tokenizer


def _is_special(tokenizer: PreTrainedTokenizerBase, number: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(number)
    return added is not None and added.special


def check_loading_info(info: Mapping[str, Any]) -> None:
    """Refuses what transformers would paper over. ``info`` is ``from_pretrained``'s ``output_loading_info``."""
    faults = []
    if info["missing_keys"]:
        faults.append(f"{len(info['missing_keys'])} tensor(s) missing: {_first_ten(sorted(info['missing_keys']))}")
    if info["unexpected_keys"]:
        faults.append(
            f"{len(info['unexpected_keys'])} tensor(s) unknown: {_first_ten(sorted(info['unexpected_keys']))}"
        )
    if info["mismatched_keys"]:
        shapes = [
            f"{shown(name)} is {tuple(got)}, expected {tuple(expected)}"
            for name, got, expected in sorted(info["mismatched_keys"])[:10]
        ]
        faults.append(f"{len(info['mismatched_keys'])} tensor(s) of another shape: {', '.join(shapes)}")
    faults.extend(_first_line(message) for message in list(info["error_msgs"])[:1])
    if faults:
        raise ModelError("weights do not fit config.json: " + "; ".join(faults), hint="the files are from two models")


def check_ties(model: PreTrainedModel) -> None:
    """Refuses weights declared as tied that the checkpoint holds twice, differently (transformers unties them)."""
    import torch

    parameters = dict(model.named_parameters(remove_duplicate=False))
    for target, origin in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        one, other = parameters.get(target), parameters.get(origin)
        if one is None or other is None or one is other:
            continue
        if one.shape != other.shape or not torch.equal(one, other):
            raise ModelError(
                f"config.json ties {shown(target)} to {shown(origin)}, the weights hold two different tensors",
                hint="set tie_word_embeddings to false if both are meant",
            )


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files that transformers would read, in its order of preference, and the index's tensor table."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single], {}
    if index.is_file():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise ModelError(f"{index.name} has no weight_map")
        if len(table) > MAX_TENSORS:
            raise ModelError(f"{index.name} lists {len(table)} tensors, the limit is {MAX_TENSORS}")
        for tensor, shard in table.items():
            if fault := name_fault(shard, nested=False):
                raise UnsafeError(f"{index.name} maps tensor {shown(tensor)} to {shown(shard)}, which {fault}")
            if not shard.endswith(".safetensors"):
                raise UnsafeError(f"{index.name} maps tensor {shown(tensor)} to {shown(shard)}, not a safetensors file")
        shards = sorted(set(table.values()))
        if missing := [shard for shard in shards if not (directory / shard).is_file()]:
            raise ModelError(f"{len(missing)} of {len(shards)} weight files missing: {_first_ten(missing)}")
        return [directory / shard for shard in shards], table
    names = sorted(path.name for path in directory.iterdir())
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        raise UnsafeError(
            f"{shown_path(directory)} holds only pickled weights, which can run code: {_first_ten(pickles)}",
            hint="convert them to safetensors (model.save_pretrained does)",
        )
    if other := [name for name in names if name.endswith((".safetensors", ".gguf"))]:
        raise ModelError(
            f"{shown_path(directory)} holds no model.safetensors nor its index, only {_first_ten(other)}",
            hint="expected the layout that save_pretrained writes",
        )
    raise ModelError(f"{shown_path(directory)} holds no model.safetensors", hint="is it a model directory?")


def refuse_code(directory: Path) -> None:
    """Raises UnsafeError for a model's or tokenizer's directory whose configuration files ask to run code, ModelError
    for one of them that is damaged."""
    for name in _CODE_CONFIGS:
        if (directory / name).is_file():
            check_no_code(name, read_json(directory / name))


def check_no_code(name: str, config: Mapping[str, Any]) -> None:
    """Raises UnsafeError where the file ``name``, which holds ``config``, asks to run code, at any depth."""
    for key, value in _nested_items(config):
        last = key.rpartition(".")[2]
        if last in ("auto_map", "trust_remote_code") and value:
            raise UnsafeError(
                f"{name} asks to run code of its own: key {shown(key)}",
                hint="pass trust_remote_code if you trust it, or delete the key if transformers knows the model itself",
            )
        # transformers downloads attention and expert kernels named like hub repositories
        if "_implementation" in last and isinstance(value, str) and "/" in value:
            raise UnsafeError(f"{name} asks to run a kernel from the hub: key {shown(key)} is {shown(value)}")


def check_config(config: Mapping[str, Any]) -> None:
    """Raises ModelError for a configuration that loading it would follow to another file or to absurd sizes."""
    if "transformers_weights" in config:
        raise ModelError("config.json names its own weight file (transformers_weights)", hint="use model.safetensors")
    for key, value in _nested_items(config):
        limit = CONFIG_LIMITS.get(key.rpartition(".")[2])
        if limit is not None and isinstance(value, int) and value > limit:
            raise ModelError(f"config.json: {shown(key)} is {value:.3g}, the limit is {limit}")


def _nested_items(value: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every ``(dotted.key, value)`` of nested objects and arrays. Depth is bounded by the JSON reader's own limit."""
    pending: list[tuple[str, object]] = [(prefix, value)]
    while pending:
        path, node = pending.pop()
        pairs: Iterable[tuple[object, Any]] = ()
        if isinstance(node, dict):
            pairs = node.items()
        elif isinstance(node, list):
            pairs = enumerate(node)
        for key, child in pairs:
            name = f"{path}.{key}" if path else str(key)
            yield name, child
            if isinstance(child, (dict, list)):
                pending.append((name, child))


def read_json(path: Path, kind: type = dict) -> Any:
    """What ``path`` holds, a ``dict`` or ``list``. Raises ModelError for a file that is damaged, of another kind or too
    large, ResourceError for one that cannot be read."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ModelError(f"{path.name} has {size} bytes, the limit is {MAX_JSON_BYTES}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except ModelError:  # a ValueError too, already worded
        raise
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is not JSON: {_first_line(error)}") from error
    except OSError as error:
        raise ResourceError(f"cannot read {shown_path(path)}: {error.strerror}") from error
    if not isinstance(value, kind):
        expected = "an object" if kind is dict else "an array"
        raise ModelError(f"{path.name} holds a {type(value).__name__}, expected {expected}")
    return value


def _first_ten(names: list[str]) -> str:
    return ", ".join(shown(name) for name in names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0][:300]
