"""The machine's RAM."""

from planner.hardware import Host
from proxy.gpus.host import read_host


def test_total_and_available(tmp_path):
    """kB are KiB; available, not free: caches give way."""
    path = tmp_path / "meminfo"
    path.write_text(
        "MemTotal:       65816124 kB\nMemFree:         1000000 kB\nMemAvailable:   60000000 kB\nHugePages_Total:       0\n"
    )
    assert read_host(path) == Host(total_bytes=65816124 * 1024, free_bytes=60000000 * 1024)


def test_unknown_where_the_system_does_not_say(tmp_path):
    """No such file (macOS, Windows), or one that says something else."""
    assert read_host(tmp_path / "none") == Host()
    (tmp_path / "meminfo").write_text("nonsense")
    assert read_host(tmp_path / "meminfo") == Host()
