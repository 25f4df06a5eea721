"""How the ranks of a machine divide its cores."""

import os

from fiddler_run.ranks import cores
from fiddler_run.ranks.cores import divide, on_own_cores
from fiddler_run.system import host

CORES = [[0, 8], [1, 9], [2, 10], [3, 11]]  # each with its siblings


def test_cores_are_divided_by_threads():
    assert divide(CORES, [2, 2], [0, 0]) == [CORES[:2], CORES[2:]]
    assert divide(CORES, [1, 3], [0, 0]) == [CORES[:1], CORES[1:]]
    assert divide(CORES, [5], [0]) == [CORES]
    parts = divide(CORES, [1, 1, 1], [0, 0, 0])
    assert [core for part in parts for core in part] == CORES
    assert all(parts)


def test_ranks_get_cores_near_their_gpus():
    """The second rank's GPU is on the first NUMA node, whose cores come first."""
    assert divide(CORES, [2, 2], [1, 0]) == [CORES[2:], CORES[:2]]


def test_a_third_gpu_changes_nothing(monkeypatch):
    monkeypatch.setattr(cores, "core_siblings", lambda: CORES)
    bound = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: bound.append(cpus))
    for nodes in ([1, 0], [1, 0, 0], [0, 0]):
        with on_own_cores([2, 2], 0, nodes):
            pass
    own = {2, 10, 3, 11}
    before = os.sched_getaffinity(0)
    assert bound == [own, before, own, before, {0, 8, 1, 9}, before]


def test_more_ranks_than_cores_leave_some_without():
    parts = divide(CORES[:1], [1, 1], [0, 0])
    assert sorted(map(len, parts)) == [0, 1]


def test_cores_are_given_back():
    before = os.sched_getaffinity(0)
    with on_own_cores([1] * len(before), 0, []):
        own = os.sched_getaffinity(0)
        assert own <= before
        assert len(own) < len(before) or len(before) == 1
    assert os.sched_getaffinity(0) == before
    with on_own_cores([1], 0, []):
        assert os.sched_getaffinity(0) == before


def test_siblings_stay_together(tmp_path, monkeypatch):
    """Two cores on two NUMA nodes, each with two CPUs."""
    monkeypatch.setattr(host, "ROOT", tmp_path)
    monkeypatch.setattr(host, "allowed_cpus", lambda: {0, 1, 2, 3})
    for cpu, (siblings, node) in enumerate([("0,2", 1), ("1,3", 0), ("0,2", 1), ("1,3", 0)]):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}"
        (folder / "topology").mkdir(parents=True)
        (folder / "topology/thread_siblings_list").write_text(siblings)
        (folder / f"node{node}").mkdir()
    assert host.core_siblings() == [[1, 3], [0, 2]]
