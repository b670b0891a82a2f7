from __future__ import annotations

import dataclasses
import json

import pytest

from ryzen_compile.errors import MemoryLimitError, UsageError
from ryzen_compile.validate import machine


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def test_this_machine_is_described():
    here = machine.read_machine()
    assert here.cpu.name and here.cpu.vendor and here.cpu.microarchitecture
    assert set(here.cpu.isa) <= set(machine.ISA)
    assert 1 <= here.usable_cores <= here.cpu.threads
    assert 0 < here.usable_memory <= here.memory_total
    assert here.versions["torch"] and set(here.versions) == set(machine.LIBRARIES)
    assert json.loads(json.dumps(dataclasses.asdict(here)))["python"] == here.python


def test_cgroup_v2_takes_the_smallest_limit_on_the_way_up(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/a/cpu.max": "150000 100000",
            "sys/fs/cgroup/a/memory.max": "4294967296",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            "sys/fs/cgroup/a/b/memory.max": "max",
        },
    )
    limits = machine.read_limits(tmp_path)
    assert limits.cpu_quota == 1.5
    assert limits.memory_limit == 4 << 30


def test_cgroup_v1_and_a_path_that_is_not_visible(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "1073741824",
        },
    )
    limits = machine.read_limits(tmp_path)
    assert limits.cpu_quota == 2.0
    assert limits.memory_limit == 1 << 30


def test_cgroup_v1_unlimited(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n1:cpu:/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        },
    )
    limits = machine.read_limits(tmp_path)
    assert limits.cpu_quota is None and limits.memory_limit is None


def test_no_cgroup_at_all(tmp_path):
    limits = machine.read_limits(tmp_path)
    assert limits.cpu_quota is None and limits.memory_limit is None
    assert limits.affinity_cores == len(limits.affinity)


def test_two_threads_of_one_core_count_once(tmp_path):
    for thread, core in ((0, 0), (1, 1), (2, 0), (3, 1)):
        topology = f"sys/devices/system/cpu/cpu{thread}/topology"
        write(tmp_path, {f"{topology}/physical_package_id": "0", f"{topology}/core_id": str(core)})
    assert machine._distinct_cores((0, 1, 2, 3), tmp_path) == 2
    assert machine._distinct_cores((0, 2), tmp_path) == 1


def test_shared_last_level_cache_counts_once(tmp_path):
    for thread, users in ((0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3")):
        cache = f"sys/devices/system/cpu/cpu{thread}/cache/index3"
        write(tmp_path, {f"{cache}/size": "32768K", f"{cache}/shared_cpu_list": users})
    assert machine.read_l3(tmp_path) == 64 << 20
    assert machine.read_l3(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(("quota", "cores"), [(None, 4), (2.9, 2), (0.5, 1), (16.0, 4)])
def test_usable_cores(quota, cores):
    here = machine.read_machine()
    limits = machine.Limits(affinity=tuple(range(4)), affinity_cores=4, cpu_quota=quota, memory_limit=None)
    assert dataclasses.replace(here, limits=limits).usable_cores == cores


def test_stream_read_is_a_plausible_rate():
    # 64 MiB may be in the cache: the figure is not the point here, that one comes out is.
    assert 0.1 < machine.stream_read_gbps(0.05, threads=2, buffer_bytes=64 << 20) < 5000


def test_stream_read_refuses_before_allocating():
    with pytest.raises(MemoryLimitError, match="more than half"):
        machine.stream_read_gbps(0.1, buffer_bytes=1 << 50)
    with pytest.raises(UsageError, match="threads >= 1"):
        machine.stream_read_gbps(0.1, threads=0)
