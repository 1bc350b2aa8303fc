from pathlib import Path

from pico_tg.backend.machine import available_memory, cgroup_limit


def test_limits_of_control_groups(tmp_path):
    """The smallest limit counts; those of cpu.max are cores."""
    own, group = tmp_path / "cgroup", tmp_path / "a" / "b"
    group.mkdir(parents=True)
    own.write_text("1:name=systemd:/elsewhere\n0::/a/b\n")

    def limit(name: str) -> float:
        return cgroup_limit(name, tmp_path, own)

    assert limit("cpu.max") == limit("memory.max") == float("inf")
    (group / "cpu.max").write_text("max 100000\n")
    (group / "memory.max").write_text("4000000000\n")
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "a" / "memory.max").write_text("max\n")
    assert (limit("cpu.max"), limit("memory.max")) == (1.5, 4e9)
    (group / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "a" / "memory.max").write_text("1000\n")
    assert (limit("cpu.max"), limit("memory.max")) == (0.5, 1000)
    own.write_text("4:memory:/a/b\n")  # cgroup v1
    assert limit("memory.max") == float("inf")
    assert cgroup_limit("memory.max", own=Path("/nowhere")) == float("inf")


def test_memory_is_that_of_this_machine():
    assert 1e8 < available_memory() < 1e14
