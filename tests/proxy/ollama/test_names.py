"""Derived names can be told from all others, lead back to their base, and keep what Ollama reads out of a name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.ollama.names import base_of, derived_name, is_stamped, shown
from proxy.simulator.store import is_valid_name

BLOB = "/root/.ollama/models/blobs/sha256-" + "5" * 64
PART = st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9_-]{0,20}", fullmatch=True)
HOST = st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}(:[0-9]{2,5})?", fullmatch=True)
OPTIONS = st.fixed_dictionaries(
    {}, optional={"main_gpu": st.integers(0, 9), "num_gpu": st.integers(0, 99), "tensor_split": st.just("7,3")}
)


@given(HOST, PART, PART, PART, OPTIONS)
def test_a_derived_name_is_valid_and_leads_back_to_its_base(host, namespace, model, tag, options):
    base = f"{host}/{namespace}/{model}:{tag}"
    name = derived_name(base, BLOB, options)
    assert is_valid_name(name)
    assert base_of(name) == base
    assert base_of(name.upper()) == base.upper()
    assert name.split("/")[1:] == base.split("/")[1:]  # Ollama looks at these
    assert not any(size in name.split(".")[0] for size in ("e2b", "e4b", "12b", "26b", "31b"))
    assert is_stamped(name, BLOB, {**options, "stop": ("x",), "num_ctx": 4096})


@given(OPTIONS, OPTIONS)
def test_the_stamp_tells_placements_apart(one, other):
    name = derived_name("h/n/m:t", BLOB, one)
    assert is_stamped(name, BLOB, other) == (one == other)
    assert not is_stamped(name, BLOB[:-1] + "6", one)


@pytest.mark.parametrize(
    "name",
    [
        "smollm2:135m",
        "me/model:latest",
        "hf.co/me/model:Q4_K_M",
        "lopsided.invalid/library/smollm2:135m",  # no stamp
        "kgmrtqpnhijk.lopsided.invalid/library/smollm2:135m",  # no host
        "kgmrtqpnhij0.registry.ollama.ai.lopsided.invalid/library/smollm2:135m",
        "kgmrtqpnhijk.registry.ollama.ai.lopsided.invalid/smollm2:135m",
        "kgmrtqpnhijk.registry.ollama.ai.lopsided.invalid.org/library/smollm2:135m",
    ],
)
def test_other_names_are_nobodys(name):
    assert base_of(name) is None
    assert not is_stamped(name, BLOB, {})


@pytest.mark.parametrize(
    ("full", "short"),
    [
        ("registry.ollama.ai/library/smollm2:135m", "smollm2:135m"),
        ("registry.ollama.ai/me/model:latest", "me/model:latest"),
        ("hf.co/me/model:Q4_K_M", "hf.co/me/model:Q4_K_M"),
    ],
)
def test_names_are_shown_as_ollama_shows_them(full, short):
    assert shown(full) == short
