"""The model store: names, digests, derived models."""

import json

import pytest

from proxy.simulator import Store, demo_models
from proxy.simulator.store import full_name, human_number, show
from tests.proxy import recordings
from tests.proxy.simulator.recorded import recorded_models

NOW = 1_800_000_000 * 10**9


@pytest.fixture
def store():
    return Store(recorded_models("0.32.15"))


@pytest.mark.parametrize("name", ["tiny", "tiny:latest", "TINY", "library/tiny", "registry.ollama.ai/library/tiny:latest"])
def test_a_model_is_found_under_every_spelling_of_its_name(store, name):
    assert store.find(name).name == "tiny:latest"


def test_other_namespaces_and_tags_are_other_models(store):
    assert store.find("someone/tiny") is None
    assert store.find("tiny:2b") is None
    assert full_name("localhost:5000/a/b") == "localhost:5000/a/b:latest"


def test_the_layer_of_the_parameters_has_the_recorded_digest(store):
    """Its bytes are those that Ollama writes: sorted keys, escaped markup, a newline."""
    lines = store.derive(store.find("smollm2:135m"), "derived", parameters={"num_gpu": 99, "main_gpu": 1}, now_ns=NOW)
    recorded = recordings.exchange("0.32.15", "create-derived").answer.body.decode().splitlines()
    assert [json.dumps({"status": line}, separators=(",", ":")) for line in lines] == recorded


def test_a_derived_model_shares_the_weights_and_keeps_the_parameters(store):
    base = store.find("smollm2:135m")
    store.derive(base, "pinned", parameters={"main_gpu": 0}, now_ns=NOW)
    pinned = store.find("pinned")
    assert (pinned.blob, pinned.parent) == (base.blob, "smollm2:135m")
    assert pinned.digest != base.digest
    assert dict(pinned.parameters) == {"main_gpu": 0, **base.parameters}
    assert "PARAMETER main_gpu 0\n" in show(pinned, verbose=False, era="llama-server")["modelfile"]


def test_making_the_same_model_again_creates_no_layer(store):
    base = store.find("smollm2:135m")
    store.derive(base, "one", parameters={"main_gpu": 0}, now_ns=NOW)
    assert not any("creating" in line for line in store.derive(base, "two", parameters={"main_gpu": 0}, now_ns=NOW))


def test_the_newest_model_is_listed_first(store):
    store.copy(store.find("tiny"), "newest", now_ns=NOW)
    assert next(iter(store)).name == "newest:latest"


def test_arrays_of_the_metadata_are_shown_when_asked_for(store):
    model = store.find("smollm2:135m")
    assert show(model, verbose=False, era="llama-server")["model_info"]["general.languages"] is None
    assert show(model, verbose=True, era="llama-server")["model_info"]["general.languages"] == ["en"]


def test_the_demo_has_models_of_many_shapes_with_digests_of_their_own():
    models = demo_models()
    assert len(models) >= 8
    assert len({model.digest for model in models}) == len({model.blob for model in models}) == len(models)
    assert any(model.profile.expert_count for model in models)
    assert {model.details()["quantization_level"] for model in models} == {"Q4_K_M", "Q8_0", "MXFP4", "F16"}


@pytest.mark.parametrize(
    ("count", "text"),
    [(134515008, "134.52M"), (68028672, "68.03M"), (8_000_000_000, "8B"), (7_615_616_512, "7.6B"), (950, "950"), (30_500, "30K")],
)
def test_parameter_counts_are_written_as_ollama_writes_them(count, text):
    """The first two are recorded."""
    assert human_number(count) == text
