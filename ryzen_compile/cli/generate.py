"""``ryzen-compile generate ARTIFACT [PROMPT]``: the continuation of a prompt, streamed to stdout."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ryzen_compile.cli import output
from ryzen_compile.cli.failure import printable
from ryzen_compile.cli.path_options import path_options, say_paths

if TYPE_CHECKING:
    import numpy as np

    from ryzen_compile.runtime.compiled import CompiledModel
    from ryzen_compile.runtime.generate import GenerationStats
    from ryzen_compile.runtime.speculative.settings import Name, Speculation
    from ryzen_compile.runtime.speculative.suffix import Corpus

CORPUS_CHARACTERS = 1 << 22  # about a million tokens, of which each takes some 500 bytes while the corpus is built


def generate(
    artifact: Annotated[Path, typer.Argument(help="Artifact directory.")],
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; read from stdin when absent.")] = None,
    max_new_tokens: Annotated[int, typer.Option("-n", "--max-new-tokens", help="At most so many tokens.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="0, the default, is greedy; default with --paths: 1.", show_default=False)
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this mass.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens this likely relative to the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages repetition.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop after this text; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Go on beyond the context: keep this many recent tokens, and the sinks.")
    ] = None,
    sinks: Annotated[int | None, typer.Option(help="First tokens that a window keeps; default: 4.")] = None,
    prompt_cache: Annotated[
        Path | None, typer.Option(help="A prompt's cache to begin from: what it shares with PROMPT is not read again.")
    ] = None,
    save_prompt_cache: Annotated[Path | None, typer.Option(help="Write PROMPT's cache to this file first.")] = None,
    speculate: Annotated[
        str | None,
        typer.Option(
            help="Draft tokens: auto, or some of lookup,suffix,early_exit,draft_model. The text stays the model's."
        ),
    ] = None,
    draft: Annotated[
        Path | None, typer.Option(help="Artifact with the same tokenizer that drafts: draft_model.")
    ] = None,
    draft_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of a draft; default: 16.")] = None,
    early_exit: Annotated[
        int | None, typer.Option(min=1, help="Draft with the first so many layers: early_exit.")
    ] = None,
    corpus: Annotated[
        list[str] | None, typer.Option(help="Text file or directory to draft from: suffix; may be repeated.")
    ] = None,
    draft_threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="A drafting model stops behind a token less probable to it; default: 0.4."),
    ] = None,
    paths: Annotated[int | None, typer.Option(min=1, help="Sample so many continuations together; one wins.")] = None,
    vote: Annotated[str | None, typer.Option(help="Which path wins: majority (default) or best.")] = None,
    answer: Annotated[str | None, typer.Option(help="Pattern of what a majority votes on; default: the text.")] = None,
    verify: Annotated[
        str | None,
        typer.Option(help="Judge paths: regex:PATTERN, json:SCHEMA.json, tests:FILE.py or program:COMMAND."),
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="Start no more paths once: first (one passes) or confident (votes are clear).")
    ] = None,
    step_tokens: Annotated[
        int | None, typer.Option(min=1, help="Every so many tokens, prune the worse paths and fork the better.")
    ] = None,
    threads: Annotated[int | None, typer.Option("-t", "--threads", min=1, help="Threads of ONNX Runtime.")] = None,
    native: output.NativeFlag = None,
    no_digests: Annotated[bool, typer.Option("--no-digests", help="Do not hash the weights before use.")] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Continue PROMPT with the model in ARTIFACT; tokens appear as they are made."""
    from ryzen_compile.api import load
    from ryzen_compile.errors import UsageError
    from ryzen_compile.runtime.generate import GenerationStats

    if window is not None and (prompt_cache is not None or save_prompt_cache is not None):
        raise UsageError("a window does not keep whole prompts", hint="give either --window or a prompt cache")
    search = path_options(
        paths,
        {"vote": vote, "answer": answer, "stop": until, "step_tokens": step_tokens},
        verify,
        apart={"--window": window, "--prompt-cache": prompt_cache or save_prompt_cache, "--speculate": speculate},
    )
    speculation = _speculation(speculate, draft, draft_tokens, early_exit, corpus or [], draft_threshold)
    references = [_reference_text(source) for source in corpus or []]
    text = sys.stdin.read() if prompt is None else prompt
    verifier = None if search is None else search.verifier(text)
    settings = {
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop_strings": stop or None,
        "seed": seed,
        "window": window,
        "sinks": sinks,
    }
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    if temperature if search is None else temperature is not None:
        given |= {"do_sample": True, "temperature": temperature}
    choice = output.native_choice(native)

    def opened(directory: Path) -> CompiledModel:
        return load(directory, task="generate", threads=threads, native=choice, digests=not no_digests)

    with ExitStack() as stack:
        model = stack.enter_context(opened(artifact))
        tokenizer = tokenizer_of(model, artifact)
        if speculation is not None:
            given["speculation"] = dataclasses.replace(speculation, corpus=_corpus(references, tokenizer))
            given["assistant_model"] = None if draft is None else stack.enter_context(opened(draft))
        if search is not None:
            say_paths(search.run(model, text, verifier, max_new_tokens=max_new_tokens, **given), as_json=as_json)
            return
        ids = tokenizer(text)["input_ids"]
        given |= _prompt_cache(model, ids, prompt_cache, save_prompt_cache)
        stats, printer = GenerationStats(), None if as_json else _Printer(tokenizer)
        result = model.generate(ids, max_new_tokens=max_new_tokens, streamer=printer, stats=stats, **given)
    new = result[0, stats.prompt_tokens :].tolist()  # an empty prompt has become BOS
    if as_json:
        output.print_json(_as_json(new, tokenizer.decode(new, skip_special_tokens=True), stats))
    else:
        _summarize(len(new), stats)


def tokenizer_of(model: CompiledModel, artifact: Path) -> Any:
    """The model's tokenizer, or ``ArtifactError`` for an ``artifact`` that came without."""
    from ryzen_compile.errors import ArtifactError

    if model.tokenizer is None:
        raise ArtifactError(f"{artifact} holds no tokenizer.json", hint="generate from ids through the Python API")
    return model.tokenizer


def speculation_names(option: str) -> list[str]:
    """What ``--speculate`` names, each once: ``auto`` and drafters. Raises ``UsageError`` for other names."""
    from ryzen_compile.errors import UsageError
    from ryzen_compile.runtime.speculative.settings import NAMES

    names = list(dict.fromkeys(option.split(",")))
    unknown = [name for name in names if name not in ("auto", *NAMES)]
    if unknown:
        raise UsageError(
            f"--speculate: unknown drafter {unknown[0]!r}", hint=f"give auto, or some of {','.join(NAMES)}"
        )
    return names


def _speculation(
    speculate: str | None,
    draft: Path | None,
    tokens: int | None,
    exit_layers: int | None,
    corpus: Sequence[str],
    threshold: float | None,
) -> Speculation | None:
    """What the options ask for, the corpus aside; an option that belongs to one drafter asks for that, too.

    Raises ``UsageError`` for one that nothing would read, and ``PromptError`` for values out of range.
    """
    from ryzen_compile.errors import UsageError
    from ryzen_compile.runtime.speculative.settings import NAMES, Speculation

    names = [] if speculate is None else speculation_names(speculate)
    is_auto = "auto" in names
    if is_auto and len(names) > 1:
        raise UsageError("--speculate auto chooses by itself", hint="give either auto or names of drafters")
    if "draft_model" in names and draft is None:
        raise UsageError("--speculate draft_model needs a model that drafts", hint="give --draft ARTIFACT as well")
    own: dict[Name, object] = {"suffix": corpus or None, "early_exit": exit_layers, "draft_model": draft}
    chosen = tuple(name for name in NAMES if name in names or own.get(name) is not None)
    for option, value in (("--draft-tokens", tokens), ("--draft-threshold", threshold)):
        if value is not None and not (is_auto or chosen):
            raise UsageError(f"{option} belongs to speculation, which nothing asks for", hint="give --speculate auto")
    if threshold is not None and not (is_auto or {"early_exit", "draft_model"} & {*chosen}):
        raise UsageError("--draft-threshold is for a model that drafts", hint="give --draft or --early-exit")
    if not (is_auto or chosen):
        return None
    asked = {"tokens": tokens, "exit_layers": exit_layers, "threshold": threshold}
    said: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return Speculation(drafters=None if is_auto else chosen, required=not is_auto, **said)


def _reference_text(source: str) -> str:
    """The text of one ``--corpus``."""
    from ryzen_compile.errors import UsageError
    from ryzen_compile.text import read_text

    text = read_text(source, characters=CORPUS_CHARACTERS + 1)
    if len(text) > CORPUS_CHARACTERS:
        raise UsageError(
            f"--corpus {source!r} holds more than {CORPUS_CHARACTERS} characters", hint="give the part that is like it"
        )
    return text


def _corpus(texts: Sequence[str], tokenizer: Any) -> Corpus | None:
    from ryzen_compile.runtime.speculative.suffix import Corpus

    return Corpus(tokenizer.encode(text) for text in texts) if texts else None


def _prompt_cache(model: CompiledModel, ids: np.ndarray, source: Path | None, target: Path | None) -> dict[str, Any]:
    """``generate``'s argument for a prompt's rows from the file ``source``; with ``target``, all of the prompt's, which
    are written there."""
    known = None if source is None else model.load_prompt_cache(source)
    if target is not None:
        known = model.read_prompt(ids, prompt_cache=known)
        model.save_prompt_cache(target, known)
    return {} if known is None else {"prompt_cache": known}


def _as_json(new: list[int], text: str, stats: GenerationStats) -> dict[str, Any]:
    return {
        "prompt_tokens": stats.prompt_tokens,
        "reused_tokens": stats.reused_tokens,
        "new_tokens": len(new),
        "text": text,
        "ids": new,
        "time_to_first_token_s": stats.time_to_first_token,
        "decode_tokens_per_s": _rate(stats),
        "speculation": None if stats.speculation is None else stats.speculation.to_json(),
    }


def _summarize(count: int, stats: GenerationStats) -> None:
    """Lines on stderr: how many tokens, how fast, and what drafts did."""
    rate, first = _rate(stats), f"first after {stats.time_to_first_token * 1e3:.0f} ms"
    output.stderr().print(
        f"[1 token, {first}]" if rate is None else f"[{count} tokens, {first}, {rate:.1f} tok/s]", markup=False
    )
    if stats.speculation is not None:
        for line in stats.speculation.to_text().splitlines():
            typer.echo(printable(line), err=True)


def _rate(stats: GenerationStats) -> float | None:
    return stats.decode_tokens / stats.decode_seconds if stats.decode_tokens else None


class _Printer:
    """Prints text as soon as it can no longer change: a character may need several tokens.

    Only the last tokens are decoded again, from one whose text is settled, so that a long text costs no more per token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._settled = 0  # of the ids: those whose text is shown
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._ids.extend(int(i) for i in value.reshape(-1))
        self._show(final=False)

    def end(self) -> None:
        self._show(final=True)
        typer.echo()

    def _show(self, *, final: bool) -> None:
        before, text = self._decoded(self._ids[: self._settled]), self._decoded(self._ids)
        if len(text) <= len(before) or (text.endswith("\ufffd") and not final):
            return
        typer.echo(text[len(before) :], nl=False)
        sys.stdout.flush()
        # Behind another token, not first: some tokenizers drop a space at the beginning of a text.
        self._ids = self._ids[self._settled :]
        self._settled = len(self._ids)

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
