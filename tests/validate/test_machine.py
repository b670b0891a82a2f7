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


def cpu(root, number, core, *, package=0, die=None, l3=None, size="32768K"):
    """One logical processor's files; ``l3`` is who shares its last-level cache."""
    home = f"sys/devices/system/cpu/cpu{number}"
    files = {f"{home}/topology/physical_package_id": str(package), f"{home}/topology/core_id": str(core)}
    if die is not None:
        files[f"{home}/topology/die_id"] = str(die)
    if l3 is not None:
        files |= {f"{home}/cache/index3/size": size, f"{home}/cache/index3/shared_cpu_list": l3}
    write(root, files)


def test_topology_of_one_core_complex(tmp_path):
    for number in range(6):
        cpu(tmp_path, number, number, l3="0-5")
    found = machine.read_topology(tmp_path)
    assert found.cores == ((0,), (1,), (2,), (3,), (4,), (5,))
    assert found.caches == (machine.CacheGroup((0, 1, 2, 3, 4, 5), 32 << 20),)
    assert found.threads_per_core == 1 and found.offline == ()


def test_topology_of_two_complexes_of_four_cores_with_two_threads_each(tmp_path):
    for number in range(16):
        group = "0-3,8-11" if number % 8 < 4 else "4-7,12-15"
        cpu(tmp_path, number, number % 8, l3=group)
    write(tmp_path, {"sys/devices/system/cpu/online": "0-15"})
    found = machine.read_topology(tmp_path)
    assert found.cores == tuple((core, core + 8) for core in range(8))
    assert [group.cpus for group in found.caches] == [(0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)]
    assert sum(group.size for group in found.caches) == machine.read_l3(tmp_path) == 64 << 20
    assert found.threads_per_core == 2


def test_topology_without_cache_information(tmp_path):
    for number in range(2):
        cpu(tmp_path, number, number)
    found = machine.read_topology(tmp_path)
    assert found.cores == ((0,), (1,)) and found.caches == () and machine.read_l3(tmp_path) is None


def test_topology_with_processors_switched_off(tmp_path):
    # The kernel takes the topology and cache of a processor away when it is switched off, not its directory.
    for number in (0, 1, 4, 5):
        cpu(tmp_path, number, number % 4, l3="0-1,4-5")
    write(tmp_path, {f"sys/devices/system/cpu/cpu{n}/online": "0" for n in (2, 3, 6, 7)})
    write(tmp_path, {"sys/devices/system/cpu/online": "0-1,4-5"})
    found = machine.read_topology(tmp_path)
    assert found.cores == ((0, 4), (1, 5)) and found.offline == (2, 3, 6, 7)
    assert found.caches == (machine.CacheGroup((0, 1, 4, 5), 32 << 20),)


def test_topology_tells_dies_and_packages_apart(tmp_path):
    for number, (package, die) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        cpu(tmp_path, number, 0, package=package, die=die)
    assert machine.read_topology(tmp_path).cores == ((0,), (1,), (2,), (3,))


@pytest.mark.parametrize("online", ["", "0-", "x", "0-1-2", "-1", "0-99999999999", "1,,2"])
def test_topology_survives_lists_that_are_none(tmp_path, online):
    cpu(tmp_path, 0, 0, l3=online)
    write(tmp_path, {"sys/devices/system/cpu/online": online})
    found = machine.read_topology(tmp_path)
    assert found.cores == () and found.offline == (0,)


def test_topology_of_a_system_that_tells_nothing(tmp_path):
    assert machine.read_topology(tmp_path) == machine.Topology()
    assert machine.Topology().threads_per_core == 1


def with_limits(affinity, cores, quota, topology=None, l3=64 << 20):
    here = machine.read_machine()
    limits = machine.Limits(tuple(affinity), cores, quota, None)
    about = dataclasses.replace(here.cpu, microarchitecture="zen4", l3_bytes=l3)
    return dataclasses.replace(here, cpu=about, limits=limits, topology=topology or machine.Topology())


TWO_COMPLEXES = machine.Topology(
    cores=tuple((core, core + 8) for core in range(8)),
    caches=(
        machine.CacheGroup((0, 1, 2, 3, 8, 9, 10, 11), 32 << 20),
        machine.CacheGroup((4, 5, 6, 7, 12, 13, 14, 15), 32 << 20),
    ),
)


@pytest.mark.parametrize(
    ("here", "cores", "threads", "key"),
    [
        (with_limits(range(16), 8, None, TWO_COMPLEXES), 8, 16, "zen4-8c-64M"),
        (with_limits((0, 1, 8, 9), 2, None, TWO_COMPLEXES), 2, 4, "zen4-2c-32M"),
        (with_limits(range(16), 8, 1.5, TWO_COMPLEXES), 1, 1, "zen4-1c-64M"),
        (with_limits(range(16), 8, 12.0, TWO_COMPLEXES), 8, 12, "zen4-8c-64M"),
        (with_limits(range(4), 4, None), 4, 4, "zen4-4c-64M"),
        (with_limits(range(4), 4, None, l3=None), 4, 4, "zen4-4c"),
        (with_limits(range(4), 4, None, l3=1 << 19), 4, 4, "zen4-4c-0.5M"),
    ],
    ids=["all", "one complex", "quota 1.5", "quota 12", "no groups", "no cache known", "half a MiB"],
)
def test_what_is_usable_and_its_key(here, cores, threads, key):
    assert (here.usable_cores, here.usable_threads, machine.cpu_key(here)) == (cores, threads, key)


def test_this_machines_topology_agrees_with_its_limits():
    here = machine.read_machine()
    if here.topology.cores:
        online = {number for core in here.topology.cores for number in core}
        assert set(here.limits.affinity) <= online and len(online) == here.cpu.threads


def test_stream_read_is_a_plausible_rate():
    # 64 MiB may be in the cache: the figure is not the point here, that one comes out is.
    assert 0.1 < machine.stream_read_gbps(0.05, threads=2, buffer_bytes=64 << 20) < 5000


def test_stream_read_refuses_before_allocating():
    with pytest.raises(MemoryLimitError, match="more than half"):
        machine.stream_read_gbps(0.1, buffer_bytes=1 << 50)
    with pytest.raises(UsageError, match="threads >= 1"):
        machine.stream_read_gbps(0.1, threads=0)
