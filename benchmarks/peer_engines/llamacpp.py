"""llama.cpp through llama-cpp-python's low-level functions, timed as llama-bench does.

A GGUF in float16 is written from the Hugging Face directory once (``gguf_model``); llama.cpp's own quantizer makes the
others. Options: ``ftype`` (Q4_0, Q8_0), ``pure`` (the output head and table in the same format; else the quantizer's
choice for them) and ``flash`` (auto, on, off). The prompt is one batch of at most 512 tokens a step, logits of the last
only; then single random tokens behind it, each waited for. No sampling is in the time.
"""

from __future__ import annotations

import ctypes
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peer_engines.child import Engine, Request, serve

FTYPES = {"Q4_0": 2, "Q8_0": 7}
FLASH = {"auto": -1, "off": 0, "on": 1}


def prepare(request: Request) -> dict[str, Any]:
    import llama_cpp

    from peer_engines.gguf_model import bytes_per_token, write_gguf

    out = Path(request.path)
    source = out.parent / "f16.gguf"
    if not source.exists():
        write_gguf(Path(request.model), source)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FTYPES[request.options["ftype"]]
    params.pure = request.options["pure"]
    params.nthread = request.threads
    target = out / "model.gguf"
    if llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(params)):
        raise RuntimeError("llama_model_quantize failed; its log says why")
    size, formats = bytes_per_token(target)
    return {"bytes_per_token": size, "format": formats}


class LlamaCpp:
    def __init__(self, request: Request) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.log: list[str] = []
        # Held on to: ctypes frees a callback that Python no longer refers to.
        self._logger = llama_cpp.llama_log_callback(lambda _level, text, _data: self.log.append(text.decode()))
        llama_cpp.llama_log_set(self._logger, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            bytes(Path(request.path) / "model.gguf"), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp did not load the model: {' '.join(self.log[-3:])}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = len(request.prompt) + request.new
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = request.threads
        params.flash_attn_type = FLASH[request.options["flash"]]
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        sys.stderr.write("".join(line for line in self.log if "input tensor" not in line))
        self.versions = {"llama-cpp-python": version("llama-cpp-python")}
        # The log lists the graph's operations; what "auto" came to stands nowhere else.
        used = "used" if any("FLASH_ATTN_EXT" in line for line in self.log) else "not used"
        self.note = f"low-level API as llama-bench, fp16 cache, flash attention {request.options['flash']} ({used})"

    def run(self, prompt: list[int], new: int) -> tuple[float, float]:
        self.api.llama_memory_clear(self.memory, False)
        started = time.perf_counter()
        for begin in range(0, len(prompt), 512):
            self._decode(prompt[begin : begin + 512])
        prefilled = time.perf_counter()
        for step in range(new):
            self._decode([(prompt[0] + 7919 * step) % self.vocabulary])
        return prefilled - started, time.perf_counter() - prefilled

    def _decode(self, tokens: list[int]) -> None:
        array = (self.api.llama_token * len(tokens))(*tokens)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        self.api.llama_synchronize(self.context)


def open_engine(request: Request) -> Engine:
    return LlamaCpp(request)


if __name__ == "__main__":
    serve(prepare, open_engine)
