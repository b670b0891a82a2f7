"""Facts about this machine that a measurement must stand beside: processor, limits, memory, library versions.

Everything is read, nothing is set. Libraries are asked for their version through their metadata, so nothing heavy is
imported here and a broken install cannot hide the rest. What cannot be read on this system is ``None``, never a guess.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
import re
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import archspec.cpu
import archspec.cpu.detect
import numpy as np
import psutil

from ryzen_compile.errors import MemoryLimitError, UsageError

# The instruction sets that decide which matrix kernels ONNX Runtime and oneDNN pick; the last two are ARM's.
ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16",
       "asimddp", "i8mm")  # fmt: skip
LIBRARIES = (
    "ryzen-compile", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-genai",
    "numpy", "safetensors", "tokenizers", "huggingface_hub", "triton",
)  # fmt: skip
ROOT = Path("/")
CPUS = "sys/devices/system/cpu"
UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a page-rounded 2**63 - 1


@dataclass(frozen=True)
class Cpu:
    """``isa`` holds those of :data:`ISA` that processor and system offer; ``cores`` are all the physical ones."""

    name: str
    vendor: str
    microarchitecture: str
    isa: tuple[str, ...]
    cores: int | None
    threads: int
    l3_bytes: int | None


@dataclass(frozen=True)
class CacheGroup:
    """Logical processors that share one last-level cache (on Ryzen: a core complex), and its size in bytes."""

    cpus: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Topology:
    """Who shares what, in numbers of logical processors, of those that are online.

    ``cores`` has one entry a physical core, its hardware threads in order; ``caches`` one a last-level cache. Both are
    empty where the system does not say. ``offline`` exist and are switched off.
    """

    cores: tuple[tuple[int, ...], ...] = ()
    caches: tuple[CacheGroup, ...] = ()
    offline: tuple[int, ...] = ()

    @property
    def threads_per_core(self) -> int:
        """The most hardware threads that a core has; 1 where nothing is known."""
        return max((len(core) for core in self.cores), default=1)


@dataclass(frozen=True)
class Limits:
    """What this process may use. ``cpu_quota`` is in processors (1.5 = one and a half), ``memory_limit`` in bytes."""

    affinity: tuple[int, ...]
    affinity_cores: int
    cpu_quota: float | None
    memory_limit: int | None


@dataclass(frozen=True)
class Machine:
    """JSON-serialisable through ``dataclasses.asdict``; sizes are in bytes, an absent library's version is ``None``."""

    cpu: Cpu
    limits: Limits
    memory_total: int
    memory_available: int
    system: str
    python: str
    versions: dict[str, str | None]
    topology: Topology = field(default_factory=Topology)

    @property
    def usable_cores(self) -> int:
        """Physical cores this process may keep busy: by affinity and the quota rounded down, at least 1."""
        cores, quota = self.limits.affinity_cores, self.limits.cpu_quota
        return cores if quota is None else max(1, min(cores, math.floor(quota)))

    @property
    def usable_threads(self) -> int:
        """Logical processors this process may keep busy: by affinity and the quota rounded down, at least 1."""
        threads, quota = len(self.limits.affinity), self.limits.cpu_quota
        return threads if quota is None else max(1, min(threads, math.floor(quota)))

    @property
    def usable_l3_bytes(self) -> int | None:
        """Bytes of the last-level caches that the allowed processors sit on; all of them where groups are unknown."""
        allowed = set(self.limits.affinity)
        reached = [group.size for group in self.topology.caches if allowed.intersection(group.cpus)]
        return sum(reached) or self.cpu.l3_bytes

    @property
    def usable_memory(self) -> int:
        """Bytes this process may hope for: the cgroup's limit where it is the smaller."""
        limit = self.limits.memory_limit
        return self.memory_available if limit is None else min(limit, self.memory_available)


def read_machine() -> Machine:
    """Everything at once; takes about 50 ms."""
    memory = psutil.virtual_memory()
    return Machine(
        cpu=read_cpu(),
        limits=read_limits(),
        memory_total=memory.total,
        memory_available=memory.available,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        versions=read_versions(),
        topology=read_topology(),
    )


def cpu_key(machine: Machine) -> str:
    """What tuned figures are kept under: ``zen4-2c-32M`` is a Zen 4 of which 2 cores and 32 MiB of cache are usable.

    The last part is absent where the cache's size is unknown. Affinity and quota count: the same processor with other
    limits is another machine to tune for.
    """
    cores, cache = f"{machine.cpu.microarchitecture}-{machine.usable_cores}c", machine.usable_l3_bytes
    return cores if cache is None else f"{cores}-{cache / (1 << 20):g}M"


def read_cpu() -> Cpu:
    # archspec's host() has the features of the catalogue entry it settles on; the detected set is the processor's.
    found = archspec.cpu.detect.detected_info()
    return Cpu(
        name=(archspec.cpu.brand_string() or platform.processor() or "unknown").strip(),
        vendor=found.vendor or "unknown",
        microarchitecture=archspec.cpu.host().name,
        isa=tuple(name for name in ISA if name in found.features),
        cores=psutil.cpu_count(logical=False),
        threads=psutil.cpu_count(logical=True) or 1,
        l3_bytes=read_l3(),
    )


def read_l3(root: Path = ROOT) -> int | None:
    """Bytes of last-level cache over all sockets and core complexes, each shared cache counted once (Linux)."""
    return sum(group.size for group in _cache_groups(root)) or None


def read_topology(root: Path = ROOT) -> Topology:
    """Cores, their hardware threads and the caches they share, from /sys (Linux; elsewhere nothing is known)."""
    cpus = _cpu_numbers(root)
    listed = _read(root / CPUS / "online")
    online = sorted(cpus if listed is None else cpus & set(_cpu_list(listed)))
    return Topology(_cores(online, root), _cache_groups(root), tuple(sorted(cpus - set(online))))


def read_limits(root: Path = ROOT) -> Limits:
    affinity = tuple(psutil.Process().cpu_affinity()) if platform.system() != "Darwin" else ()
    affinity = affinity or tuple(range(psutil.cpu_count() or 1))
    quotas, memories = [], []
    for directory in _cgroup_chain(root):
        quotas.append(_cpu_quota(directory))
        memories.append(_memory_limit(directory))
    return Limits(
        affinity=affinity,
        affinity_cores=_distinct_cores(affinity, root),
        cpu_quota=min((quota for quota in quotas if quota is not None), default=None),
        memory_limit=min((limit for limit in memories if limit is not None), default=None),
    )


def read_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def stream_read_gbps(seconds: float = 1.0, *, threads: int | None = None, buffer_bytes: int | None = None) -> float:
    """Memory read bandwidth in GB/s (10**9 bytes): the median pass over a buffer too large for the caches.

    Every thread reads its own part, the parts start together, and a pass lasts until the slowest is done. ``threads``
    defaults to the processors this process may use, ``buffer_bytes`` to 512 MiB or twice the last-level cache. Takes
    ``seconds`` (at least 3 passes) and the time to fill the buffer. Raises ``MemoryLimitError`` before allocating when
    the buffer is more than half of the memory at hand, ``UsageError`` on a size or count below 1.
    """
    limits = read_limits()
    threads = threads if threads is not None else len(limits.affinity)
    buffer_bytes = buffer_bytes if buffer_bytes is not None else max(512 << 20, 2 * (read_l3() or 0))
    if threads < 1 or buffer_bytes < 8 * threads:
        raise UsageError(f"stream read: expected threads >= 1 and 8 bytes for each, got {threads} and {buffer_bytes}")
    at_hand = min(psutil.virtual_memory().available, limits.memory_limit or UNLIMITED)
    if buffer_bytes > at_hand // 2:
        raise MemoryLimitError(
            f"stream read: the buffer of {buffer_bytes >> 20} MiB is more than half of the {at_hand >> 20} MiB at hand",
            hint="give a smaller buffer_bytes",
        )
    words = buffer_bytes // 8 // threads
    with ThreadPoolExecutor(threads) as pool:
        # Filled by the threads that will read them (first touch decides the NUMA node), and not with zeros: the system
        # backs untouched zero pages with one page that stays in the cache.
        parts = list(pool.map(lambda seed: np.full(words, seed + 1, np.int64), range(threads)))
        rates: list[float] = []
        until = time.perf_counter() + seconds
        while len(rates) < 3 or time.perf_counter() < until:
            start = time.perf_counter()
            # An integer OR needs one instruction per vector and no rounding order: of numpy's reductions it came
            # closest to the memory's own speed, and numpy drops the interpreter lock while it runs.
            list(pool.map(np.bitwise_or.reduce, parts))
            rates.append(words * 8 * threads / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates)


def _cgroup_chain(root: Path) -> list[Path]:
    """Directories of this process's control groups and all their parents: a limit anywhere above holds as well."""
    mount = root / "sys/fs/cgroup"
    chain: dict[Path, None] = {}
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        # Version 2 has no controllers and one tree; version 1 one tree per controller. Inside a container the path may
        # be the host's, which is not visible: then only the parents that exist count, down to the mount itself.
        bases = (
            [mount]
            if not controllers
            else [mount / name for name in ("cpu", "memory") if name in controllers.split(",")]
        )
        for base in bases:
            group = base / path.strip("/")
            while group != base:
                chain[group] = None
                group = group.parent
            chain[base] = None
    return list(chain)


def _cpu_quota(group: Path) -> float | None:
    v2 = (_read(group / "cpu.max") or "max").split()
    if v2[0] != "max":
        return int(v2[0]) / int(v2[1])
    quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota is not None and period is not None and int(quota) > 0 else None


def _memory_limit(group: Path) -> int | None:
    text = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes") or "max"
    return None if text == "max" or int(text) >= UNLIMITED else int(text)


def _distinct_cores(affinity: tuple[int, ...], root: Path) -> int:
    """Physical cores behind the allowed threads: two threads of one core count once."""
    return len(_cores(affinity, root))


def _cores(cpus: Sequence[int], root: Path) -> tuple[tuple[int, ...], ...]:
    """``cpus`` by physical core; one that the system says nothing about is a core of its own."""
    cores: dict[tuple[str | None, ...], list[int]] = {}
    for cpu in cpus:
        topology = root / f"{CPUS}/cpu{cpu}/topology"
        # Core numbers repeat between packages and, on some processors, between the dies of one.
        place = tuple(_read(topology / name) for name in ("physical_package_id", "die_id", "core_id"))
        known = place[0] is not None and place[2] is not None
        cores.setdefault(place if known else (None, str(cpu)), []).append(cpu)
    return tuple(tuple(core) for core in cores.values())


def _cache_groups(root: Path) -> tuple[CacheGroup, ...]:
    """Every last-level cache once, in the order of its first processor."""
    groups: set[CacheGroup] = set()
    for cpu in _cpu_numbers(root):
        cache = root / f"{CPUS}/cpu{cpu}/cache/index3"
        size, users = _read(cache / "size"), _read(cache / "shared_cpu_list")
        if size is not None and users is not None and size.endswith("K") and size[:-1].isdigit():
            groups.add(CacheGroup(_cpu_list(users), int(size[:-1]) * 1024))
    return tuple(sorted(groups, key=lambda group: group.cpus))


def _cpu_numbers(root: Path) -> set[int]:
    """Logical processors that have a directory, switched on or not."""
    names = (path.name[3:] for path in (root / CPUS).glob("cpu[0-9]*"))
    return {int(name) for name in names if name.isdigit()}


def _cpu_list(text: str) -> tuple[int, ...]:
    """The kernel's ``0-3,8,10-11`` as numbers; nothing for what is not of that form."""
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", part)
        if not found:
            return ()
        numbers.extend(range(int(found[1]), int(found[2] or found[1]) + 1))
    return tuple(numbers)


def _read(path: Path) -> str | None:
    """The stripped text of a small kernel file, or None where it does not exist or may not be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return None
