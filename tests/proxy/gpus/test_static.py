"""Rigs written down: ``--gpu`` arguments and TOML profiles."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.units import GIB
from proxy.errors import GpuError
from proxy.gpus.static import StaticSource, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("22GiB", 22 * GIB), ("22528 MiB", 22 * GIB), ("24GB", 24 * 10**9), ("0.5tib", 2**39), (" 31500MiB ", 31500 * 2**20)],
)
def test_sizes(text, size):
    """Powers of two with an i, powers of ten without."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "22", "22G", "GiB", "-1GiB", "22GiB!", "1e3GiB", "nanGiB"])
def test_no_sizes(text):
    """A number without a unit could mean anything: refused."""
    with pytest.raises(ValueError, match="no size"):
        parse_size(text)


@given(st.text(max_size=20))
def test_any_argument_is_a_rig_or_a_clear_error(text):
    """Whatever is typed behind ``--gpu``: no other exception."""
    with suppress(GpuError):
        assert len(StaticSource.from_arguments([text]).rig().gpus) == 1


def test_arguments_make_a_rig_in_their_order():
    """Facts from the table, free memory as said or less the driver's reserve; equal cards are told apart."""
    rig = StaticSource.from_arguments(["RTX 5090", "RTX 3090:22GiB", "RTX 3090: 22GiB"]).rig()
    fast, slow, third = rig.gpus
    assert (fast.name, fast.sm_count, fast.clock_mhz, fast.compute_capability) == ("GeForce RTX 5090", 170, 2407, (12, 0))
    assert (fast.total_bytes, fast.free_bytes) == (32 * GIB, 31555 * 2**20)
    assert (slow.free_bytes, third.free_bytes) == (22 * GIB, 22 * GIB)
    assert len({gpu.uuid for gpu in rig.gpus}) == 3
    assert rig.host.total_bytes is None or rig.host.total_bytes > 0


def test_what_was_measured_on_a_card_is_not_taken_for_another_in_its_place():
    """UUIDs, by which measurements are kept: a profile's first card, another first card, and one of the command line."""
    first = [StaticSource.from_profile({"gpu": [{"name": name}]}).rig().gpus[0].uuid for name in ("RTX 5090", "RTX 4060")]
    thought = StaticSource.from_arguments(["RTX 5090"]).rig().gpus[0].uuid
    assert len({*first, thought}) == 3
    assert first[0] == StaticSource.from_profile({"gpu": [{"name": "RTX 5090", "free": "9GiB"}]}).rig().gpus[0].uuid


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("RTX 5090:40GiB", "more than the card's"),
        ("RTX 5090:lots", "no size"),
        ("RTX 5090:", "no size"),
        ("RTX 5090:0GiB", "greater than 0"),
        ("RTX 1", "no card is known"),
        ("RTX 5090,RTX 3090", "repeat it for more"),
    ],
)
def test_arguments_that_make_no_sense(argument, says):
    """Refused with what is wrong."""
    with pytest.raises(GpuError, match=says):
        StaticSource.from_arguments([argument])


PROFILE = """
[[gpu]]
name = "RTX 5090"
free = "30GiB"
clock_mhz = 2000

[[gpu]]
name = "Prototype"
total = "64GiB"
compute_capability = "13.1"
bandwidth = "3000GB"
uuid = "GPU-1"

[host]
total = "128GiB"
free = "100GiB"
bandwidth = "60GB"
"""


def test_a_profile(tmp_path):
    """Facts of the file win over the table; a card that is not in it needs its total; the host comes with it."""
    path = tmp_path / "rig.toml"
    path.write_text(PROFILE)
    rig = StaticSource.from_file(path).rig()
    known, new = rig.gpus
    assert (known.name, known.free_bytes, known.clock_mhz, known.sm_count) == ("GeForce RTX 5090", 30 * GIB, 2000, 170)
    assert (new.name, new.uuid, new.total_bytes, new.sm_count) == ("Prototype", "GPU-1", 64 * GIB, None)
    assert (new.compute_capability, new.bandwidth_bytes_per_s, new.library) == ((13, 1), 3000 * 10**9, "CUDA")
    assert (rig.host.total_bytes, rig.host.free_bytes, rig.host.bandwidth_bytes_per_s) == (128 * GIB, 100 * GIB, 60 * 10**9)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "gpu: Field required"),
        ("gpu = []", "gpu: .*at least 1"),
        ("gpu = 3", "gpu: .*list"),
        ("[[gpu]]", r"gpu\.1\.name: Field required"),
        ('[[gpu]]\nname = "RTX 5090"\nfree = 3.5', r"gpu\.1\.free"),
        ('[[gpu]]\nname = "RTX 5090"\nfree = "3"', r"gpu\.1\.free: '3' is no size"),
        ('[[gpu]]\nname = "RTX 5090"\nvram = "3GiB"', r"gpu\.1\.vram: Extra inputs are not permitted"),
        ('[[gpu]]\nname = "RTX 5090"\ncompute_capability = 8.6', r'gpu\.1\.compute_capability: .*like "8\.6"'),
        ('[[gpu]]\nname = "RTX 5090"\n[[gpu]]\nname = "New"', "no card is known as 'New'"),
        ('[[gpu]]\nname = "RTX 5090"\nuuid = "a"\n[[gpu]]\nname = "RTX 3090"\nuuid = "a"', "same uuid"),
        ('[[gpu]]\nname = "RTX 5090"\n[host]\ntotal = -1', r"host\.total"),
        ("[[gpu", "no TOML"),
        ("total = " + "9" * 5000, "no TOML"),
        ("a = " + "[" * 3000 + "]" * 3000, "no TOML"),
        ('[[gpu]]\nname = "RTX 5090"\npcie_generation = 2000', r"gpu\.1\.pcie_generation"),
        ('[[gpu]]\nname = "RTX 5090"\nsm_count = 9223372036854775807', r"gpu\.1\.sm_count"),
        ('[[gpu]]\nname = "RTX 5090"\nbandwidth = 9223372036854775807', r"gpu\.1\.bandwidth"),
        ("\x00", "no TOML"),
    ],
)
def test_profiles_that_make_no_sense(tmp_path, text, says):
    """The error names the file, the entry and what is wrong with it."""
    path = tmp_path / "rig.toml"
    path.write_text(text)
    with pytest.raises(GpuError, match=says) as caught:
        StaticSource.from_file(path)
    assert "rig.toml" in str(caught.value)


def test_a_profile_that_cannot_be_read(tmp_path):
    """No file, and bytes that are no text."""
    with pytest.raises(GpuError, match="cannot be read"):
        StaticSource.from_file(tmp_path / "none.toml")
    path = tmp_path / "rig.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GpuError, match="no TOML"):
        StaticSource.from_file(path)
