"""``ryzen-compile generate ARTIFACT [PROMPT]``: the continuation of a prompt, streamed to stdout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ryzen_compile.cli import output


def generate(
    artifact: Annotated[Path, typer.Argument(help="Artifact directory.")],
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; read from stdin when absent.")] = None,
    max_new_tokens: Annotated[int, typer.Option("-n", "--max-new-tokens", help="At most so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
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
    threads: Annotated[int | None, typer.Option("-t", "--threads", min=1, help="Threads of ONNX Runtime.")] = None,
    native: output.NativeFlag = None,
    no_digests: Annotated[bool, typer.Option("--no-digests", help="Do not hash the weights before use.")] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Continue PROMPT with the model in ARTIFACT; tokens appear as they are made."""
    import numpy as np

    from ryzen_compile.api import load
    from ryzen_compile.errors import ArtifactError, UsageError
    from ryzen_compile.runtime.generate import GenerationStats

    if window is not None and (prompt_cache is not None or save_prompt_cache is not None):
        raise UsageError("a window does not keep whole prompts", hint="give either --window or a prompt cache")
    text = sys.stdin.read() if prompt is None else prompt
    sampling = {
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop_strings": stop or None,
        "seed": seed,
        "window": window,
        "sinks": sinks,
    }
    if temperature:
        sampling |= {"do_sample": True, "temperature": temperature}
    choice = output.native_choice(native)
    with load(artifact, threads=threads, native=choice, digests=not no_digests) as model:
        tokenizer: Any = model.tokenizer
        if tokenizer is None:
            raise ArtifactError(f"{artifact} holds no tokenizer.json", hint="generate from ids through the Python API")
        ids = np.array([tokenizer.encode(text)], dtype=np.int64)
        stats = GenerationStats()
        printer = None if as_json else _Printer(tokenizer)
        given: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
        if prompt_cache is not None:
            given["prompt_cache"] = model.load_prompt_cache(prompt_cache)
        if save_prompt_cache is not None:
            given["prompt_cache"] = model.read_prompt(ids, prompt_cache=given.get("prompt_cache"))
            model.save_prompt_cache(save_prompt_cache, given["prompt_cache"])
        result = model.generate(ids, max_new_tokens=max_new_tokens, streamer=printer, stats=stats, **given)
        new = result[0, stats.prompt_tokens :].tolist()  # an empty prompt has become BOS
        rate = stats.decode_tokens / stats.decode_seconds if stats.decode_tokens else None
        if as_json:
            output.print_json(
                {
                    "prompt_tokens": stats.prompt_tokens,
                    "reused_tokens": stats.reused_tokens,
                    "new_tokens": len(new),
                    "text": tokenizer.decode(new, skip_special_tokens=True),
                    "ids": new,
                    "time_to_first_token_s": stats.time_to_first_token,
                    "decode_tokens_per_s": rate,
                }
            )
            return
    first = f"first after {stats.time_to_first_token * 1e3:.0f} ms"
    output.stderr().print(
        f"[1 token, {first}]" if rate is None else f"[{len(new)} tokens, {first}, {rate:.1f} tok/s]", markup=False
    )


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
