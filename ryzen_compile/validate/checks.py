"""Judgements on this machine and installation, one line each: pass, warn or fail, with what to do about it.

Takes facts (a ``Machine``, what the probes answered, where the hub's cache is) and looks nothing up itself, so that
every judgement can be tested without the machine that calls for it.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from ryzen_compile.validate.machine import Machine, cpu_key

GIB, MIB = 1 << 30, 1 << 20
SMALLEST_MEMORY = 1 * GIB
COMFORTABLE_MEMORY = 4 * GIB
# From the best to the least: what has to be there, what it is called, and what is lost against the best.
_SLOWER_SUMS = (
    "without VNNI each int8 product takes three instructions instead of one, so prompts and batches lose most of the "
    "gain of integers; a single row, bound by memory, loses less"
)
KERNEL_PATHS: tuple[tuple[frozenset[str], str, str], ...] = (
    (frozenset({"avx512f", "avx512_vnni"}), "AVX-512 VNNI", ""),
    (
        frozenset({"avx2", "avx_vnni"}),
        "AVX2 VNNI",
        "vectors of 32 instead of 64 bytes: prompts take up to twice as long, a single row is bound by memory",
    ),
    (frozenset({"avx512f"}), "AVX-512", _SLOWER_SUMS),
    (frozenset({"avx2"}), "AVX2", _SLOWER_SUMS),
    (frozenset({"asimddp", "i8mm"}), "NEON int8 matrix", ""),
    (frozenset({"asimddp"}), "NEON dot product", ""),
)


@dataclass(frozen=True)
class Check:
    """``fix`` is empty where there is nothing to do."""

    name: str
    status: Literal["pass", "warn", "fail"]
    detail: str
    fix: str = ""


def check_isa(machine: Machine) -> Check:
    cpu = machine.cpu
    detail = (
        f"{cpu.name} ({cpu.vendor}, {cpu.microarchitecture}): {' '.join(cpu.isa) or 'none of the vector extensions'}"
    )
    if "avx2" in cpu.isa or "x86" not in machine.system:
        return Check("processor", "pass", detail)
    return Check(
        "processor", "warn", detail, "AVX2 is missing: it works, slowly; in a virtual machine, pass the host's CPU"
    )


def check_cores(machine: Machine) -> Check:
    cpu, limits = machine.cpu, machine.limits
    detail = f"{cpu.cores or '?'} cores, {cpu.threads} threads, {machine.usable_cores} cores usable by this process"
    if cpu.cores is not None and limits.affinity_cores < cpu.cores:
        return Check("cores", "warn", detail, "affinity leaves out cores: see taskset -p, or the container's cpuset")
    return Check("cores", "pass", detail)


def check_topology(machine: Machine) -> Check:
    """Which processors are one core and which share a cache: threads of one group exchange data without the memory."""
    found = machine.topology
    if not found.cores:
        return Check("topology", "pass", f"not told by this system; tuned figures are kept as {cpu_key(machine)}")
    groups = [f"{group.size / MIB:g} MiB for {_ranges(group.cpus)}" for group in found.caches]
    parts = [
        f"{len(found.cores)} cores x {found.threads_per_core} threads online",
        f"last-level cache: {', '.join(groups) or 'not told'}",
        f"allowed: {_ranges(machine.limits.affinity)}",
    ]
    if found.offline:
        parts.append(f"offline: {_ranges(found.offline)}")
    return Check("topology", "pass", "; ".join([*parts, f"tuned figures are kept as {cpu_key(machine)}"]))


def check_kernels(machine: Machine) -> Check:
    """The path of ONNX Runtime's product with quantized weights (int8 activations) on these instruction sets."""
    has = frozenset(machine.cpu.isa)
    for needed, name, lost in KERNEL_PATHS:
        if needed <= has:
            return Check("int8 kernels", "pass", f"quantized weights run on {name}" + (f"; {lost}" if lost else ""))
    return Check(
        "int8 kernels",
        "warn",
        "no integer kernel for this processor: quantized weights are unpacked and multiplied in float32",
        "expect less memory but no speed from int8 and int4; in a virtual machine, pass the host's CPU",
    )


def _ranges(cpus: Sequence[int]) -> str:
    """``processors 0-3,8``: the kernel's notation; ``none`` for an empty list."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ("processors " + ",".join(f"{a}-{b}" if a != b else f"{a}" for a, b in runs)) if runs else "none"


def check_quota(machine: Machine) -> Check:
    quota = machine.limits.cpu_quota
    if quota is None:
        return Check("cgroup", "pass", "no processor quota")
    detail = f"quota of {quota:g} processors"
    if quota < machine.limits.affinity_cores:
        return Check(
            "cgroup", "warn", detail, f"more threads than that are throttled: use --threads {machine.usable_cores}"
        )
    return Check("cgroup", "pass", detail)


def check_memory(machine: Machine) -> Check:
    limit = machine.limits.memory_limit
    within = f", limited to {limit / GIB:.1f} GiB by the cgroup" if limit is not None else ""
    detail = f"{machine.memory_available / GIB:.1f} of {machine.memory_total / GIB:.1f} GiB available{within}"
    if machine.usable_memory < SMALLEST_MEMORY:
        return Check("memory", "fail", detail, "free at least 1 GiB, or raise the container's limit")
    if machine.usable_memory < COMFORTABLE_MEMORY:
        return Check("memory", "warn", detail, "a model needs about 1.5 times its fp32 weights while it is exported")
    return Check("memory", "pass", detail)


def check_versions(distribution: str = "ryzen-compile") -> Check:
    """Every dependency of the installed distribution is there, in its range."""
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires(distribution) or ()]
    except importlib.metadata.PackageNotFoundError:
        return Check(
            "libraries", "warn", f"{distribution} runs from a checkout", "pip install -e . to have ranges checked"
        )
    wrong = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            have = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            have = ""
        if not have or not requirement.specifier.contains(have, prereleases=True):
            wrong.append((requirement, have))
    if not wrong:
        return Check("libraries", "pass", f"all dependencies of {distribution} are in their ranges")
    detail = ", ".join(f"{need.name}{need.specifier} needed, {have or 'nothing'} found" for need, have in wrong)
    return Check(
        "libraries", "fail", detail, "pip install " + " ".join(f"'{need.name}{need.specifier}'" for need, _ in wrong)
    )


def check_onnxruntime(found: Mapping[str, Any]) -> Check:
    fix = "pip install --force-reinstall 'onnxruntime>=1.30'"
    if "error" in found:
        return Check("onnxruntime", "fail", str(found["error"]), fix)
    detail = f"{found['version']}, {', '.join(found['providers'])}"
    if not found["group_query_attention"]:
        return Check("onnxruntime", "fail", f"{detail}; no GroupQueryAttention on the CPU", fix)
    return Check("onnxruntime", "pass", f"{detail}; GroupQueryAttention on the CPU")


def check_native(found: Mapping[str, Any]) -> Check:
    """``found`` is what ``probe("native")`` answered, or why there is no library (``missing``) and a ``remedy``."""
    lost = "ONNX Runtime's own are used: slower products with integer weights, and slower attention over long contexts"
    if "missing" in found:
        return Check(
            "native operators", "warn" if found["remedy"] else "pass", f"{found['missing']}; {lost}", found["remedy"]
        )
    if "error" in found:
        return Check(
            "native operators", "warn", f"cannot be loaded: {found['error']}; {lost}", "install ryzen-compile again"
        )
    if found["isa"] == "scalar":
        return Check(
            "native operators",
            "warn",
            f"built, but this processor has none of the instruction sets that they are written for; {lost}",
            "in a virtual machine, pass the host's CPU",
        )
    return Check("native operators", "pass", f"{found['isa']}, in ONNX Runtime {found['version']}")


def check_genai(machine: Machine) -> Check:
    version = machine.versions.get("onnxruntime-genai")
    if version is None:
        fix = "pip install onnxruntime-genai, to run artifacts with it; nothing else needs it"
        return Check("genai", "warn", "onnxruntime-genai is not installed", fix)
    return Check("genai", "pass", f"onnxruntime-genai {version}")


def check_hub(cache: Path, *, offline: bool) -> Check:
    """Whether a model named by its hub id could be stored in ``cache``, which need not exist yet."""
    existing = cache
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    if offline:
        return Check(
            "hub", "pass", f"offline: local directories and what {cache} holds" + ("" if writable else ", read-only")
        )
    if not writable:
        return Check("hub", "warn", f"{cache} cannot be written to", "set HF_HOME to a writable directory")
    return Check("hub", "pass", f"{cache} is writable")


def check_gpu(found: Mapping[str, Any]) -> Check:
    """A GPU is an option, so only a GPU without its compiler is worth a warning."""
    if "error" in found:
        return Check("gpu", "warn", f"could not be asked: {found['error']}", "only needed for a GPU: reinstall torch")
    if found["device"] is None:
        return Check("gpu", "pass", "no CUDA device; the processor is used")
    if found["triton"] is None:
        return Check("gpu", "warn", f"{found['device']}, no triton", "pip install 'ryzen-compile[triton]'")
    return Check("gpu", "pass", f"{found['device']}, triton {found['triton']}")
