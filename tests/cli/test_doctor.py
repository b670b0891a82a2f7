from __future__ import annotations

import dataclasses
import json

import pytest

from ryzen_compile import cli
from ryzen_compile.backends.onnxruntime import native
from ryzen_compile.cli import doctor
from ryzen_compile.kernels import cpu
from ryzen_compile.validate import checks, probe
from ryzen_compile.validate.machine import CacheGroup, Cpu, Limits, Machine, Topology

GIB = 1 << 30
GOOD = Machine(
    cpu=Cpu("AMD Ryzen 9", "AuthenticAMD", "zen5", ("avx2", "avx512f"), cores=8, threads=16, l3_bytes=64 << 20),
    limits=Limits(affinity=tuple(range(16)), affinity_cores=8, cpu_quota=None, memory_limit=None),
    memory_total=64 * GIB,
    memory_available=48 * GIB,
    system="Linux 6.12 x86_64",
    python="3.12.1",
    versions={"onnxruntime-genai": "0.18.0"},
)
ORT = {"version": "1.31.1", "providers": ["CPUExecutionProvider"], "group_query_attention": True}


def with_limits(**changed) -> Machine:
    return dataclasses.replace(GOOD, limits=dataclasses.replace(GOOD.limits, **changed))


TWO_COMPLEXES = dataclasses.replace(
    GOOD,
    topology=Topology(
        cores=tuple((core, core + 8) for core in range(8)),
        caches=(
            CacheGroup((0, 1, 2, 3, 8, 9, 10, 11), 32 << 20),
            CacheGroup((4, 5, 6, 7, 12, 13, 14, 15), 32 << 20),
        ),
        offline=(16, 17, 19),
    ),
)


def with_isa(*isa: str, system: str = GOOD.system) -> Machine:
    return dataclasses.replace(GOOD, cpu=dataclasses.replace(GOOD.cpu, isa=isa), system=system)


@pytest.mark.parametrize(
    ("check", "status", "said"),
    [
        (checks.check_isa(GOOD), "pass", "zen5"),
        (checks.check_isa(with_isa()), "warn", "AVX2 is missing"),
        (checks.check_isa(with_isa(system="Darwin 24 arm64")), "pass", ""),
        (checks.check_cores(GOOD), "pass", "8 cores, 16 threads, 8 cores usable"),
        (checks.check_cores(with_limits(affinity=(0, 1), affinity_cores=1)), "warn", "taskset"),
        (checks.check_topology(GOOD), "pass", "not told by this system; tuned figures are kept as zen5-8c-64M"),
        (checks.check_topology(TWO_COMPLEXES), "pass", "8 cores x 2 threads online"),
        (
            checks.check_topology(TWO_COMPLEXES),
            "pass",
            "32 MiB for processors 0-3,8-11, 32 MiB for processors 4-7,12-15",
        ),
        (checks.check_topology(TWO_COMPLEXES), "pass", "allowed: processors 0-15; offline: processors 16-17,19"),
        (
            checks.check_topology(dataclasses.replace(GOOD, topology=Topology(cores=((0,), (1,))))),
            "pass",
            "2 cores x 1 threads online; last-level cache: not told",
        ),
        (checks.check_kernels(with_isa("avx2", "avx512f", "avx512_vnni", "avx_vnni")), "pass", "on AVX-512 VNNI"),
        (checks.check_kernels(with_isa("avx2", "avx_vnni")), "pass", "on AVX2 VNNI; vectors of 32"),
        (checks.check_kernels(GOOD), "pass", "on AVX-512; without VNNI each int8 product takes three instructions"),
        (checks.check_kernels(with_isa("avx2")), "pass", "on AVX2; without VNNI"),
        (checks.check_kernels(with_isa("asimddp", system="Linux 6 aarch64")), "pass", "on NEON dot product"),
        (checks.check_kernels(with_isa("asimddp", "i8mm")), "pass", "on NEON int8 matrix"),
        (checks.check_kernels(with_isa()), "warn", "multiplied in float32"),
        (checks.check_quota(GOOD), "pass", "no processor quota"),
        (checks.check_quota(with_limits(cpu_quota=1.5)), "warn", "--threads 1"),
        (checks.check_quota(with_limits(cpu_quota=2.5)), "warn", "--threads 2"),
        (checks.check_quota(with_limits(cpu_quota=64.0)), "pass", "64"),
        (checks.check_memory(GOOD), "pass", "48.0 of 64.0 GiB"),
        (checks.check_memory(with_limits(memory_limit=2 * GIB)), "warn", "limited to 2.0 GiB"),
        (checks.check_memory(with_limits(memory_limit=GIB // 2)), "fail", "at least 1 GiB"),
        (checks.check_onnxruntime(ORT), "pass", "GroupQueryAttention on the CPU"),
        (checks.check_onnxruntime({**ORT, "group_query_attention": False}), "fail", "no GroupQueryAttention"),
        (checks.check_onnxruntime({"error": "ended in SIGILL"}), "fail", "SIGILL"),
        (checks.check_native({"isa": "avx2_vnni", "version": "1.31.1"}), "pass", "avx2_vnni, in ONNX Runtime 1.31.1"),
        (checks.check_native({"missing": "no compiler", "remedy": "install g++"}), "warn", "slower products"),
        (checks.check_native({"missing": "this is Darwin", "remedy": ""}), "pass", "ONNX Runtime's own are used"),
        (checks.check_native({"error": "ended in SIGILL"}), "warn", "cannot be loaded: ended in SIGILL"),
        (checks.check_native({"isa": "scalar", "version": "1.31.1"}), "warn", "pass the host's CPU"),
        (checks.check_genai(GOOD), "pass", "0.18.0"),
        (checks.check_genai(dataclasses.replace(GOOD, versions={})), "warn", "pip install onnxruntime-genai"),
        (checks.check_gpu({"device": None, "triton": None}), "pass", "no CUDA device"),
        (checks.check_gpu({"device": "H200", "triton": None}), "warn", "ryzen-compile[triton]"),
        (checks.check_gpu({"device": "H200", "triton": "3.9.0"}), "pass", "triton 3.9.0"),
        (checks.check_gpu({"error": "no torch"}), "warn", "no torch"),
        (checks.check_versions("no-such-distribution"), "warn", "checkout"),
        (checks.check_versions("typer"), "pass", "ranges"),
    ],
    ids=lambda value: f"{value.name}-{value.status}" if isinstance(value, checks.Check) else "",
)
def test_judgements(check, status, said):
    assert check.status == status
    assert said in f"{check.detail} {check.fix}"
    assert bool(check.fix) == (status != "pass")


def test_a_dependency_out_of_range_is_named(monkeypatch):
    wanted = ["torch>=99", "no-such-thing>=1", "numpy>=1", "triton>=3; extra == 'triton'"]
    monkeypatch.setattr(checks.importlib.metadata, "requires", lambda _: wanted)
    check = checks.check_versions("x")
    assert check.status == "fail"
    assert "torch>=99 needed, 2." in check.detail and "no-such-thing>=1 needed, nothing found" in check.detail
    assert check.fix == "pip install 'torch>=99' 'no-such-thing>=1'"


def test_hub_cache(tmp_path):
    assert checks.check_hub(tmp_path / "not" / "yet", offline=False).status == "pass"
    blocked = tmp_path / "file"
    blocked.touch()
    assert checks.check_hub(blocked / "hub", offline=False).status == "warn"
    assert checks.check_hub(blocked / "hub", offline=True).status == "pass"


def test_probe_answers_for_onnxruntime():
    found = probe.probe("onnxruntime")
    assert found["group_query_attention"] is True and "CPUExecutionProvider" in found["providers"]


@pytest.mark.parametrize(
    ("program", "why", "timeout"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL", 30.0),
        ("raise ImportError('libfoo.so: cannot open')", "cannot open", 30.0),
        ("raise SystemExit(3)", "exit status 3", 30.0),
        ("import time; time.sleep(30)", "no answer", 0.5),
    ],
)
def test_a_broken_engine_is_an_answer(monkeypatch, tmp_path, program, why, timeout):
    script = tmp_path / "broken.py"
    script.write_text(program)
    monkeypatch.setattr(probe, "__file__", str(script))
    assert why in probe.probe("gpu", timeout=timeout)["error"]


def test_command_prints_lines_and_fixes(monkeypatch, capsys):
    shown = [checks.Check("memory", "pass", "plenty"), checks.Check("hub", "warn", "read-\x1bonly", "set HF_HOME")]
    monkeypatch.setattr(doctor, "_checks", lambda: shown)
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == (
        "pass  memory  plenty\nwarn  hub     read-\\x1bonly\n              fix: set HF_HOME\n"
    )


def test_command_fails_with_json(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_checks", lambda: [checks.Check("memory", "fail", "none", "buy some")])
    assert cli.main(["doctor", "--json"]) == doctor.FAILED
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "ok": False,
        "checks": [{"name": "memory", "status": "fail", "detail": "none", "fix": "buy some"}],
    }


def test_no_color_is_honoured(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_checks", lambda: [checks.Check("memory", "pass", "plenty")])
    monkeypatch.setenv("FORCE_COLOR", "1")
    cli.main(["doctor"])
    assert "\x1b[32m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    cli.main(["doctor"])
    assert "\x1b[32m" not in capsys.readouterr().out


def test_this_machine_passes_for_real(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = {check["name"]: check["status"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert found["onnxruntime"] == "pass" and len(found) == 12 and {"topology", "int8 kernels"} <= set(found)
    lost = native.unusable() and cpu.supported()  # where they cannot be had, there is nothing to warn of
    assert found["native operators"] == ("warn" if lost else "pass")


def test_a_library_that_cannot_be_loaded_is_an_answer(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF and nothing more")
    assert "broken.so" in probe.probe("native", str(broken))["error"]


@pytest.mark.parametrize("built", [None, "here"])
def test_the_library_is_asked_for_in_a_child(monkeypatch, tmp_path, built):
    asked = []
    library = None if built is None else tmp_path / built
    monkeypatch.setattr(native, "library", lambda: library)
    monkeypatch.setattr(native, "missing", lambda: ("not built", "build it"))
    monkeypatch.setattr(probe, "probe", lambda *arguments: asked.append(arguments) or {"isa": "avx2"})
    found = doctor._native_operators()
    assert found == ({"missing": "not built", "remedy": "build it"} if built is None else {"isa": "avx2"})
    assert asked == ([] if built is None else [("native", str(library))])


def test_env_names_the_instruction_set_or_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "missing", lambda: ("not built", "build it"))
    assert cli.main(["env"]) == 0
    assert "- Native operators: none: not built\n" in capsys.readouterr().out
    monkeypatch.setattr(native, "library", lambda: tmp_path / "lib.so")
    monkeypatch.setattr(native, "best_isa", lambda: "avx2_vnni")
    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["native"] == "avx2_vnni (lib.so)"
