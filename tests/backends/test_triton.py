"""The Triton backend in Triton's interpreter (on a GPU where there is one): the same texts as the references."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import fx, nn

import ryzen_compile
from ryzen_compile import kernels
from ryzen_compile.backends.eager import EagerBackend
from ryzen_compile.backends.triton import TritonBackend, graphs
from ryzen_compile.backends.triton.lowering import lower
from ryzen_compile.backends.triton.rest import compile_rest
from ryzen_compile.capture import capture
from ryzen_compile.config import Recipe, find_recipe
from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.pipeline import default_passes, run_passes
from ryzen_compile.program import Program
from ryzen_compile.row_shifts import row_shifts
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.runtime.speculative.settings import Speculation
from ryzen_compile.train.module import training_module
from tests.kernels.oracle import nmse
from tests.zoo import CASES, VOCAB, NanoDecoder, build, randomize

pytestmark = pytest.mark.usefixtures("untuned")


pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FOR_GOOD = ExitStack()  # kept: what is collected is left
PROMPT = [5, 17, 42, 8, 91, 3, 3, 60, 5, 17]
CASE = {case.name: case for case in CASES}


@contextmanager
def detached() -> Iterator[None]:
    """Operators on the CPU run their references again, which the rest of the suite is about."""
    with ExitStack() as stack:
        for names in kernels.LAUNCHERS.values():
            for name in names:
                operator = torch._library.custom_ops.OPDEFS[f"ryzen::{name}"]
                stack.enter_context(operator.set_kernel_enabled("cpu", enabled=False))
        yield


@pytest.fixture(scope="module", autouse=True)
def attached() -> Iterator[None]:
    kernels.attach(DEVICE)
    yield
    if DEVICE == "cpu":
        FOR_GOOD.enter_context(detached())


def program_of(model: nn.Module, recipe: Recipe) -> Program:
    kept = recipe.kv.model_copy(update={"bounded": False})
    passes = default_passes(recipe.model_copy(update={"kv": kept}))
    program, _ = run_passes(capture(model), passes, supported_ops=kernels.supported_ops())
    return program


def compiled(program: Program, precision: str = "fp32", **settings: object) -> CompiledModel:
    return CompiledModel(TritonBackend(DEVICE).compile(program, precision), **settings)


def reference(program: Program, **arguments: object) -> list[int]:
    """The text of the eager backend, whose operators run their references."""
    with detached() if DEVICE == "cpu" else ExitStack():
        return CompiledModel(EagerBackend().compile(program)).generate([PROMPT], **arguments)[0].tolist()


@pytest.fixture(scope="module")
def llama() -> Program:
    return program_of(build(CASE["llama"]), find_recipe("fp32"))


@pytest.mark.parametrize(
    "name",
    ["llama", "gemma2", "gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gptj", "gpt_oss", "qwen3"))],
)
def test_decoders_give_the_references_text(name):
    program = program_of(build(CASE[name]), find_recipe("fp32"))
    with compiled(program) as model:
        assert model.generate([PROMPT], max_new_tokens=3)[0].tolist() == reference(program, max_new_tokens=3)


def test_a_plain_module_runs_as_well():
    torch.manual_seed(0)
    decoder = NanoDecoder().eval()
    randomize(decoder)
    program = program_of(decoder, find_recipe("fp32"))
    with compiled(program) as model:
        assert model.generate([PROMPT], max_new_tokens=2)[0].tolist() == reference(program, max_new_tokens=2)


@pytest.mark.parametrize(
    "settings", [{"kv": "int8"}, *(pytest.param(s, marks=pytest.mark.slow) for s in ({}, {"kv": "int4-g16"}))], ids=str
)
def test_integer_weights_and_caches_give_the_references_text(settings):
    recipe = find_recipe("int4", method="mse", **settings)
    text = torch.tensor([PROMPT * 4])
    kept = recipe.model_copy(update={"kv": recipe.kv.model_copy(update={"bounded": False})})
    program, _ = run_passes(capture(build(CASE["llama"])), default_passes(kept, calibration=text))
    with compiled(program) as model:
        assert model.generate([PROMPT], max_new_tokens=3)[0].tolist() == reference(program, max_new_tokens=3)


@pytest.mark.parametrize(("precision", "limit"), [("bf16", 3e-2), ("fp16", 5e-3)])
def test_half_precision_stays_close(llama, precision, limit):
    """Logits of float32 are around 2 wide; the format has 8 or 11 bits."""
    with compiled(llama) as exact, compiled(llama, precision) as half:
        assert {slot.key_format for slot in half.engine.slots} == {"fp16"}
        want, got = exact([PROMPT]), half([PROMPT])
    error = np.sqrt(np.square(got - want).mean() / np.square(want).mean())
    assert 0 < error < limit


def test_prompts_in_chunks_batches_and_copies(llama):
    with compiled(llama) as model:
        whole = model.generate([PROMPT], max_new_tokens=3)[0].tolist()
        assert model.generate([PROMPT], max_new_tokens=3, prefill_chunk_size=4)[0].tolist() == whole
        short = [0] * 6 + PROMPT[:4]
        pair = model.generate([short, PROMPT], [[0] * 6 + [1] * 4, [1] * 10], max_new_tokens=3)
        assert pair[1].tolist() == whole
        assert pair[0, 6:].tolist() == model.generate([PROMPT[:4]], max_new_tokens=3)[0].tolist()
        only = {"do_sample": True, "top_k": 1}
        copies = model.generate([PROMPT], max_new_tokens=3, num_return_sequences=2, **only)
        assert copies.tolist() == [whole, whole]


def test_drafts_are_verified(llama):
    everything = [list(range(VOCAB))]  # whatever follows was there before
    settings = Speculation(drafters=("lookup",), tokens=3, fixed=True, ngram=1)
    with compiled(llama) as model:
        plain = model.generate(everything, max_new_tokens=4)[0].tolist()
        drafted = model.generate(everything, max_new_tokens=4, speculation=settings)[0].tolist()
        assert drafted == plain and model.speculation.drafted > 0


def test_prefixes_and_streams_work_on_the_devices_rows(llama):
    with compiled(llama, prefix_bytes=1 << 20) as model:
        long = PROMPT * 4
        first = model.generate([long], max_new_tokens=2)[0].tolist()
        assert model.generate([long], max_new_tokens=2)[0].tolist() == first
        assert model.prefixes is not None and model.prefixes.stats.tokens_reused == 32
    text = {"max_new_tokens": 14, "window": 16, "sinks": 2}
    with compiled(llama, motion=tuple(row_shifts(llama))) as model:
        streamed = model.generate([PROMPT * 3], **text)[0].tolist()
    with detached() if DEVICE == "cpu" else ExitStack():
        eager = CompiledModel(EagerBackend().compile(llama), motion=tuple(row_shifts(llama)))
        assert streamed == eager.generate([PROMPT * 3], **text)[0].tolist()


def test_steps_give_the_logits_of_several_tokens(llama):
    engine = TritonBackend(DEVICE).compile(llama, "fp32")
    cache = KVCache(engine.slots, 1, 16, storage=engine.storage)
    tokens = np.array([PROMPT])
    several = engine.step(tokens, cache, last=4)
    assert several.shape == (1, 4, engine.spec.vocab)
    for count in (10, 9):
        one = engine.step(tokens[:, :count], cache)
        np.testing.assert_allclose(one[0, -1], several[0, count - 7], rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused(llama):
    engine = TritonBackend(DEVICE).compile(llama, "fp32")
    with pytest.raises(UsageError, match=r"the cache lies elsewhere than on .*; make it with storage=engine\.storage"):
        engine.step(np.array([[1]]), KVCache(engine.slots, 1, 4))
    with pytest.raises(UsageError, match=r"has 1 rows of 4 tokens, the step needs 1 of 5; call cache\.reserve"):
        engine.step(np.array([[1] * 5]), KVCache(engine.slots, 1, 4, storage=engine.storage))
    with pytest.raises(UsageError, match="precision must be one of bf16, fp16, fp32, got 'int8'"):
        TritonBackend(DEVICE).compile(llama, "int8")
    with pytest.raises(UsageError, match="no key/value cache; run insert_kv_cache first"):
        TritonBackend(DEVICE).compile(capture(build(CASE["llama"])), "fp32")


def test_a_cache_that_evicts_by_itself_is_refused():
    recipe = find_recipe("fp32")
    program, _ = run_passes(capture(build(CASE["mistral"])), default_passes(recipe))
    assert any(slot.window for slot in program.slots), "or there is nothing to refuse"
    with pytest.raises(UnsupportedError, match="evicts rows of its cache by itself; insert the cache with"):
        TritonBackend(DEVICE).compile(program, "fp32")


SPELLINGS = {
    "converted": lambda ids, w: torch.sin(torch.arange(ids.shape[1], device=ids.device).type_as(w)),
    "counted in floats": lambda ids, w: torch.sin(torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)),
    "times a weight": lambda ids, w: torch.sin(torch.arange(ids.shape[1], device=ids.device) * w[0]),
    "times a number": lambda ids, w: torch.sin(torch.arange(ids.shape[1], device=ids.device) * 0.1),
    "sine of integers": lambda ids, w: torch.sin(torch.arange(ids.shape[1], device=ids.device)),
}


class Angles(nn.Module):
    """Turns by angles that it computes from positions, in a way that nothing recognises."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.inner = NanoDecoder()
        self.block_size = self.inner.block_size
        self.spelling = spelling
        self.speed = nn.Parameter(torch.tensor([0.3]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids) * (1 + 0.001 * SPELLINGS[self.spelling](ids, self.speed))[None, :, None]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_positions_as_numbers_are_refused_in_half_precision(spelling):
    torch.manual_seed(0)
    program = program_of(Angles(spelling).eval(), find_recipe("fp32", logits="all"))
    with pytest.raises(UnsupportedError, match=r"computes with positions as numbers.*use precision fp32"):
        TritonBackend(DEVICE).compile(program, "bf16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_install():
    lack, remedy = kernels.probe()
    with pytest.raises(UnsupportedError, match="backend 'triton' is not available here") as caught:
        ryzen_compile.optimize(build(CASE["llama"]), "fp32", backend="triton")
    assert lack in caught.value.message and caught.value.hint == remedy


def test_precision_belongs_to_the_backend():
    model = build(CASE["llama"])
    with pytest.raises(UsageError, match="backend 'eager' computes in fp32, not 'bf16'; precision is for backend"):
        ryzen_compile.optimize(model, "fp32", backend="eager", precision="bf16")
    with pytest.raises(UsageError, match="precision must be one of bf16, fp16, fp32, got 'fp8'"):
        ryzen_compile.optimize(model, "fp32", backend="triton", precision="fp8")
    with pytest.raises(UsageError, match="prefill 'int8' is for backend 'onnxruntime', not 'eager'"):
        ryzen_compile.optimize(model, "int4", backend="eager", prefill="int8")


class Leftovers(nn.Module):
    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        scaled = (x * 3.0).tanh() + 1
        return torch.nn.functional.linear(scaled, w) * 2.0


def test_runs_of_pointwise_work_are_compiled_and_products_are_not():
    program = torch.export.export(Leftovers(), (torch.randn(2, 4), torch.randn(3, 4)))
    graph = fx.GraphModule(nn.Module(), program.graph_module.graph)
    seen: list[list[str]] = []

    def compiler(part: fx.GraphModule) -> fx.GraphModule:
        seen.append([node.target._opname for node in part.graph.nodes if node.op == "call_function"])
        return part

    x, w = torch.randn(2, 4), torch.randn(3, 4)
    fused = compile_rest(graph, compiler)
    assert seen == [["mul", "tanh", "add"]], "the lone product behind the linear is not worth a kernel"
    torch.testing.assert_close(fused(x, w)[0], Leftovers()(x, w), rtol=0, atol=0)


def test_layers_that_are_alike_are_compiled_once():
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                x = torch.nn.functional.linear((x * 3.0).tanh() + 1, w)
            return x

    x, w = torch.randn(2, 4), torch.randn(4, 4)
    exported = torch.export.export(Twice(), (x, w))
    seen: list[fx.GraphModule] = []
    fused = compile_rest(fx.GraphModule(nn.Module(), exported.graph_module.graph), lambda p: seen.append(p) or p)
    assert len(seen) == 1
    torch.testing.assert_close(fused(x, w)[0], Twice()(x, w), rtol=0, atol=0)


def test_models_that_wait_for_numbers_are_not_captured(llama):
    assert lower(llama, torch.device(DEVICE), torch.float32).uncapturable == ""
    program = llama.copy()
    logits = program.outputs[0]
    with program.graph.inserting_before(logits):
        made = program.graph.call_function(torch.ops.aten.nonzero.default, (program.inputs[0],))
        made.meta["val"] = torch.zeros(1, 2, dtype=torch.long)
    output = program.graph.output_node()
    with program.graph.inserting_before(output):
        total = program.graph.call_function(torch.ops.aten.add.Tensor, (logits, made))
        total.meta["val"] = logits.meta["val"]
    program.exported.graph.output_node().args = ((total, *output.args[0][1:]),)
    assert "nonzero" in lower(program, torch.device(DEVICE), torch.float32).uncapturable


class Recorded:
    """Stands in for a captured graph: it runs the step that was captured, whatever it is asked to run later."""

    def __init__(self, inputs: list[torch.Tensor], step: Callable[..., torch.Tensor], pool: object) -> None:
        self.graph = SimpleNamespace(pool=lambda: pool)
        self._step = step

    def replay(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return self._step(*inputs)


def test_a_captured_step_is_used_for_steps_like_it_alone(llama, monkeypatch):
    """Other buffers, sizes and numbers of logits take steps of their own: a graph holds addresses."""
    monkeypatch.setattr(graphs, "_Captured", Recorded)
    plain, capturing = (TritonBackend(DEVICE).compile(llama, "fp32") for _ in range(2))
    capturing._graphs = graphs.StepGraphs()
    tokens = np.array([[5, 17, 42]])
    for engine in (plain, capturing):
        caches = [KVCache(engine.slots, rows, 4, limit=16, storage=engine.storage) for rows in (1, 1, 2)]
        views = [caches[0], caches[1], caches[2].row(0), caches[2].row(1)]
        found = []
        for turn in range(3):  # plain, captured, replayed
            for number, cache in enumerate(views):
                ids = tokens + turn + number
                found.append(engine.step(ids, cache, last=1 + turn % 2 * 2)[0, -1])
        caches[0].reserve(16)  # into other buffers
        found.append(engine.step(tokens + 9, caches[0], last=3)[0, -1])
        if engine is plain:
            expected = found
    np.testing.assert_array_equal(np.array(found), np.array(expected))


def test_a_program_trains_through_the_kernels():
    ids = torch.tensor([[5, 17, 42, 8, 91]], device=DEVICE)
    model = build(CASE["llama"]).to(DEVICE)
    passes = default_passes(find_recipe("fp32", logits="all"))
    fused, _ = run_passes(capture(model), passes[: [p.name for p in passes].index("insert_kv_cache")])
    module = training_module(fused)
    positions = torch.arange(ids.shape[1], device=DEVICE)[None]
    found: list[dict[str, torch.Tensor]] = []
    for attached in (True, False):
        model.zero_grad()
        with ExitStack() if attached or DEVICE == "cuda" else detached():
            loss = torch.nn.functional.cross_entropy(module(ids, positions)[0, :-1], ids[0, 1:])
            loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert any((found[0][name] != found[1][name]).any() for name in found[0]) or DEVICE == "cuda", "other sums"
    assert max(nmse(found[0][name], found[1][name]) for name in found[0]) < 1e-8


@pytest.mark.gpu
def test_captured_steps_are_the_plain_ones(llama):
    with compiled(llama) as model:
        text = model.generate([PROMPT], max_new_tokens=24)[0].tolist()
        assert any(captured is not None for captured in model.engine._graphs._known.values())
        model.engine._graphs = None
        assert model.generate([PROMPT], max_new_tokens=24)[0].tolist() == text
