"""The directory layout of sentence-transformers, read and written: how an encoder's tokens become the vector of a text.

``modules.json`` lists steps, each with a folder of settings: a transformer, pooling, and perhaps normalization. Other
chains (dense layers, several poolings side by side, modules with code of their own) are refused by name. The directory
is untrusted input, as for ``source``; nothing of sentence-transformers is imported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ryzen_compile.errors import ModelError, UnsafeError, UnsupportedError
from ryzen_compile.manifest import name_fault, shown, shown_path
from ryzen_compile.source import check_no_code, read_json
from ryzen_compile.spec import SIMILARITIES, EncoderSettings, Pooling, PoolingMode

MODULES_NAME = "modules.json"
SETTINGS_NAME = "config_sentence_transformers.json"
TRANSFORMER_NAME = "sentence_bert_config.json"
POOLING_FOLDER, NORMALIZE_FOLDER = "1_Pooling", "2_Normalize"
# Of every directory that is written here; the folder for normalization is there where it is done.
LAYOUT_NAMES = (MODULES_NAME, SETTINGS_NAME, TRANSFORMER_NAME, f"{POOLING_FOLDER}/config.json")
MAX_PROMPTS, MAX_PROMPT_CHARACTERS = 1_000, 100_000
# The layout's names of what we have, as strings and as the flags that releases before 6 wrote.
MODES: dict[str, PoolingMode] = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
# Settings of the transformer module that change what it computes, with the values that stand for the plain model.
PLAIN_TRANSFORMER: dict[str, tuple[object, ...]] = {
    "transformer_task": (None, "feature-extraction"),
    "module_output_name": (None, "token_embeddings"),
    "modality_config": (None, {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}),
}


@dataclass(frozen=True)
class SentenceLayout:
    """``transformer`` is the directory of the model itself, ``directory`` or a folder in it."""

    transformer: Path
    settings: EncoderSettings


def read_layout(directory: Path) -> SentenceLayout | None:
    """What ``directory`` says of an encoder; None where it holds no ``modules.json``.

    Raises ``ModelError`` for files that are damaged or contradict each other, ``UnsupportedError`` for modules and
    settings that are not carried, ``UnsafeError`` for modules with code of their own and paths that leave the
    directory.
    """
    if not (directory / MODULES_NAME).is_file():
        return None
    chain = _chain(directory)
    kinds = [kind for kind, _ in chain]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedError(
            f"{shown_path(directory)} computes its vectors by {', '.join(map(shown, kinds))}, "
            "expected Transformer, Pooling and perhaps Normalize",
            hint="a model with other modules runs in sentence-transformers only",
        )
    folders = [folder for _, folder in chain]
    pooling = Pooling(_pooling_mode(folders[1]), normalize=len(chain) == 3)
    if pooling.normalize:
        _check_normalize(folders[2])
    settings = _with_model_settings(EncoderSettings(pooling), directory)
    return SentenceLayout(folders[0], _with_transformer_settings(settings, folders[0]))


def write_layout(directory: Path, settings: EncoderSettings, *, hidden: int) -> None:
    """Writes ``settings`` of an encoder of ``hidden`` channels into ``directory``: what ``read_layout`` reads."""
    package = "sentence_transformers.models"  # resolved by every release since 2.0
    kinds = {"Transformer": "", "Pooling": POOLING_FOLDER}
    if settings.pooling.normalize:
        kinds["Normalize"] = NORMALIZE_FOLDER
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"{package}.{kind}"}
        for index, (kind, path) in enumerate(kinds.items())
    ]
    _write(directory / MODULES_NAME, modules)
    _write(directory / TRANSFORMER_NAME, {"max_seq_length": settings.context, "do_lower_case": settings.lower_case})
    mode = next(name for name, known in MODES.items() if known == settings.pooling.mode)
    # The flags are read by every release, the mode by those that no longer know a new flag.
    flags = {flag: name == mode for flag, name in FLAGS.items()}
    _write(directory / POOLING_FOLDER / "config.json", {"word_embedding_dimension": hidden, **flags})
    if settings.pooling.normalize:
        _write(directory / NORMALIZE_FOLDER / "config.json", {})
    _write(
        directory / SETTINGS_NAME,
        {
            "model_type": "SentenceTransformer",
            "prompts": dict(settings.prompts),
            "default_prompt_name": settings.default_prompt,
            "similarity_fn_name": settings.similarity,
            "truncate_dim": settings.dims,
        },
    )


def _chain(directory: Path) -> list[tuple[str, Path]]:
    """The modules' kinds and folders, in their order."""
    listed = read_json(directory / MODULES_NAME, list)
    chain = []
    for number, module in enumerate(listed):
        where = f"{MODULES_NAME}, module {number}"
        kind, path = (module.get(key) for key in ("type", "path")) if isinstance(module, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str):
            raise ModelError(f"{where}: expected a type and a path, got {shown(module)}")
        if not kind.startswith("sentence_transformers."):
            raise UnsafeError(
                f"{where} is {shown(kind)}, code of the model's own", hint="it runs in sentence-transformers only"
            )
        if path and (fault := name_fault(path)):
            raise UnsafeError(f"{where}: its path {shown(path)} {fault}")
        folder = directory / path
        if not folder.resolve().is_relative_to(directory.resolve()):
            raise UnsafeError(f"{where}: its path {shown(path)} leads out of the directory")
        if module.get("kwargs"):
            raise UnsupportedError(f"{where} takes arguments of its own: {shown(module['kwargs'])}")
        chain.append((kind.rpartition(".")[2], folder))
    return chain


def _pooling_mode(folder: Path) -> PoolingMode:
    found = _settings(folder / "config.json")
    if found is None:
        raise ModelError(f"{shown_path(folder)} holds no config.json", hint="expected the settings of the pooling")
    asked = found.get("pooling_mode")
    modes = [name for flag, name in FLAGS.items() if found.get(flag) is True] if asked is None else asked
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not all(isinstance(mode, str) for mode in modes):
        raise ModelError(f"{shown_path(folder)}: expected a pooling mode, got {shown(asked)}")
    if len(modes) > 1:
        raise UnsupportedError(
            f"{shown_path(folder)} puts {len(modes)} poolings side by side: {', '.join(map(shown, modes))}"
        )
    mode = modes[0] if modes else "mean"  # sentence-transformers' own reading of no flag at all
    if mode not in MODES:
        raise UnsupportedError(f"{shown_path(folder)} pools by {shown(mode)}", hint=f"known are {', '.join(MODES)}")
    if found.get("include_prompt", True) is not True:
        raise UnsupportedError(f"{shown_path(folder)} leaves the prompt's tokens out of the pooling")
    return MODES[mode]


def _check_normalize(folder: Path) -> None:
    for key, value in (_settings(folder / "config.json") or {}).items():
        if value not in (None, "sentence_embedding"):
            raise UnsupportedError(f"{shown_path(folder)} normalizes something else: {shown(key)} is {shown(value)}")


def _with_transformer_settings(settings: EncoderSettings, folder: Path) -> EncoderSettings:
    names = sorted(path.name for path in folder.glob("sentence_*_config.json"))  # releases before 1.0 had one a model
    name = TRANSFORMER_NAME if TRANSFORMER_NAME in names else next(iter(names), TRANSFORMER_NAME)
    found = _settings(folder / name) or {}
    for key, value in found.items():
        if key not in ("max_seq_length", "do_lower_case") and value and value not in PLAIN_TRANSFORMER.get(key, ()):
            raise UnsupportedError(f"{name}: {shown(key)} is {shown(value)}, which is not carried")
    context, lower_case = found.get("max_seq_length"), found.get("do_lower_case") or False
    if not isinstance(lower_case, bool):
        raise ModelError(f"{name}: do_lower_case is {shown(lower_case)}, expected true or false")
    return replace(settings, context=_count(context, f"{name}: max_seq_length"), lower_case=lower_case)


def _with_model_settings(settings: EncoderSettings, directory: Path) -> EncoderSettings:
    found = _settings(directory / SETTINGS_NAME)
    if found is None:
        return settings
    kind, similarity = found.get("model_type"), found.get("similarity_fn_name")
    if kind not in (None, "SentenceTransformer"):
        raise UnsupportedError(f"{SETTINGS_NAME}: the model is a {shown(kind)}, expected a SentenceTransformer")
    if similarity not in (None, *SIMILARITIES):
        raise UnsupportedError(f"{SETTINGS_NAME}: the similarity {shown(similarity)} is not carried")
    prompts, default = found.get("prompts") or {}, found.get("default_prompt_name")
    if not isinstance(prompts, dict) or len(prompts) > MAX_PROMPTS:
        raise ModelError(f"{SETTINGS_NAME}: expected at most {MAX_PROMPTS} prompts by name")
    for name, prompt in prompts.items():
        if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT_CHARACTERS:
            raise ModelError(f"{SETTINGS_NAME}: the prompt {shown(name)} is no text, or too long")
    if default is not None and default not in prompts:
        raise ModelError(f"{SETTINGS_NAME}: the default prompt {shown(default)} is not among the prompts")
    return replace(
        settings,
        prompts=prompts,
        default_prompt=default,
        similarity=similarity or "cosine",
        dims=_count(found.get("truncate_dim"), f"{SETTINGS_NAME}: truncate_dim"),
    )


def _settings(path: Path) -> dict[str, Any] | None:
    """A file of settings that may be absent, and asks for no code."""
    if not path.is_file():
        return None
    found: dict[str, Any] = read_json(path, dict)
    check_no_code(path.name, found)
    return found


def _count(value: object, what: str) -> int | None:
    if value is None:
        return None
    if type(value) is not int or value < 1:
        raise ModelError(f"{what} is {shown(value)}, expected a number of at least 1")
    return value


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=isinstance(value, dict)) + "\n", encoding="utf-8")
