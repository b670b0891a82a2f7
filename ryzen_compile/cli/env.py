"""``ryzen-compile env``: the facts that a bug report needs, as Markdown to paste."""

from __future__ import annotations

from dataclasses import asdict

from ryzen_compile.cli import output
from ryzen_compile.cli.failure import printable

GIB = 1 << 30


def env(as_json: output.JsonFlag = False) -> None:
    """Print versions, processor, limits and memory: paste it into a bug report."""
    from ryzen_compile.validate.machine import read_machine

    here = read_machine()
    if as_json:
        output.print_json({**asdict(here), "native": _native_operators()})
        return
    cpu, limits = here.cpu, here.limits
    quota = "none" if limits.cpu_quota is None else f"{limits.cpu_quota:g} processors"
    limit = "none" if limits.memory_limit is None else f"{limits.memory_limit / GIB:.1f} GiB"
    facts = {
        "System": here.system,
        "Python": here.python,
        "Processor": f"{cpu.name} ({cpu.vendor}, {cpu.microarchitecture})",
        "Instruction sets": ", ".join(cpu.isa) or "none of those that matter here",
        "Cores": f"{cpu.cores or '?'} ({cpu.threads} threads), {here.usable_cores} usable by this process",
        "Native operators": _native_operators(),
        "Limits": f"processor quota {quota}, memory {limit}",
        "Memory": f"{here.memory_total / GIB:.1f} GiB, {here.memory_available / GIB:.1f} GiB available",
    }
    output.stderr().print("Copy the text below into your report:\n")
    lines = [f"- {name}: {printable(text)}" for name, text in facts.items()]
    lines += [f"- {name}: {version or 'not installed'}" for name, version in here.versions.items()]
    output.stdout().print("\n".join(lines), markup=False)


def _native_operators() -> str:
    """Their instruction set and where they are, or why there are none."""
    from ryzen_compile.backends.onnxruntime.native import best_isa, library, missing
    from ryzen_compile.errors import UnsupportedError

    built = library()
    if built is None:
        return f"none: {missing()[0]}"
    try:
        return f"{best_isa()} ({built.name})"
    except UnsupportedError as error:
        return error.message
