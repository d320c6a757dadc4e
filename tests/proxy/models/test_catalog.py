"""Model facts from Ollama: what its answers say, what can't be planned, and how little is asked."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from planner.profile import ModelProfile
from proxy.errors import ModelError, UpstreamError
from proxy.models.catalog import Catalog, full_name
from proxy.models.gguf import read_header, read_profile
from tests.gguf_files import TENSORS, gguf
from tests.proxy.recordings import exchange

DIGEST = "d" * 64
HEADERS = Path(__file__).parents[2] / "data" / "gguf"


class FakeOllama:
    """Answers ``/api/tags`` and ``/api/show`` from dictionaries and keeps a list of what was asked."""

    def __init__(self) -> None:
        self.tags: list[dict[str, Any]] = []
        self.shows: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.now = 0.0
        self.delay_s = 0.0

    def add(self, name: str, show: dict[str, Any], *, digest: str = DIGEST, size: int = 0, **tags: Any) -> None:
        self.tags = [tag for tag in self.tags if tag["name"] != name]
        self.tags.append({"name": name, "model": name, "digest": digest, "size": size, **tags})
        self.shows[name] = show

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(self.delay_s)
        if request.url.path == "/api/tags":
            self.asked.append("tags")
            return httpx.Response(200, json={"models": self.tags})
        body = json.loads(request.content)
        self.asked.append(f"show {body['model']}{' verbose' if body.get('verbose') else ''}")
        show = self.shows[body["model"]]
        return httpx.Response(200, json=show.get("verbose", show) if body.get("verbose") else show)

    def catalog(self) -> Catalog:
        return Catalog(client(self), clock=lambda: self.now)


def client(handler: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.MockTransport(handler), base_url="http://ollama")


@pytest.fixture
def ollama() -> FakeOllama:
    return FakeOllama()


def show_of(profile: ModelProfile, *, verbose: bool = True, modelfile: str = "FROM /nowhere\n", **more: Any) -> dict[str, Any]:
    """What ``/api/show`` says about ``profile``; without ``verbose`` arrays are null."""
    info = {
        key: (list(value) if verbose else None) if isinstance(value, tuple) else value for key, value in profile.metadata.items()
    }
    rows = [{"name": t.name, "type": t.type.name, "shape": list(t.shape)} for t in profile.tensors]
    details = {"format": "gguf", "family": profile.architecture}
    return {"modelfile": modelfile, "model_info": info, "tensors": rows, "details": details, **more}


@pytest.mark.parametrize("version", ["0.24.0", "0.32.15"])
@pytest.mark.parametrize("recorded", ["show", "show-derived"])
async def test_a_recorded_ollama_says_what_the_file_says(version, recorded, smollm2_path):
    """Both eras' answers about SmolLM2 give the profile that its GGUF gives: every layer, tensor and figure."""

    def answer(request: httpx.Request) -> httpx.Response:
        name = "tags" if request.url.path == "/api/tags" else recorded
        return httpx.Response(200, content=exchange(version, name).answer.body)

    facts = await Catalog(client(answer)).facts("SmolLM2:135m")
    profile = read_profile(smollm2_path)
    assert facts.profile.layers == profile.layers
    assert set(facts.profile.tensors) == set(profile.tensors)  # Ollama sorted them when it took the file in
    assert (facts.profile.input_bytes, facts.profile.output_bytes) == (profile.input_bytes, profile.output_bytes)
    assert facts.profile.per_layer("attention.head_count_kv") == profile.per_layer("attention.head_count_kv")
    assert facts.profile.file_bytes == pytest.approx(profile.file_bytes, rel=1e-5)
    assert facts.profile.name == "smollm2:135m"
    assert re.fullmatch(r"/root/\.ollama/models/blobs/sha256-[0-9a-f]{64}", facts.blob)
    assert facts.defaults["stop"] == ("<|im_start|>", "<|im_end|>")
    wanted = (99, 1) if recorded == "show-derived" else (None, None)
    assert (facts.default_integer("num_gpu"), facts.default_integer("main_gpu")) == wanted
    assert (facts.projector_bytes, facts.adapter_bytes, facts.is_embedding) == (0, 0, False)


@pytest.mark.parametrize("path", sorted(HEADERS.glob("*.gguf")), ids=lambda path: path.stem)
async def test_any_architecture_by_api_show_alone(ollama, path):
    """Sixteen models whose file can't be read here: the same layers and metadata as from the header, arrays of layers too."""
    profile = read_profile(path)
    ollama.add("m:latest", show_of(profile, verbose=False) | {"verbose": show_of(profile)}, size=profile.file_bytes)
    facts = await ollama.catalog().facts("m")
    assert (facts.profile.layers, facts.profile.file_bytes) == (profile.layers, profile.file_bytes)
    assert facts.profile.per_layer("attention.head_count_kv") == profile.per_layer("attention.head_count_kv")
    has_arrays = any(
        isinstance(value, tuple) and not key.startswith(("general.", "tokenizer.")) for key, value in profile.metadata.items()
    )
    assert ollama.asked == ["tags", "show m:latest"] + ["show m:latest verbose"] * has_arrays


@pytest.mark.parametrize("left_out", [None, []])
async def test_arrays_that_were_left_out_are_asked_for(ollama, left_out):
    """Ollama shortens arrays to null or to nothing, by its version."""
    profile = read_profile(HEADERS / "gemma4-31b-q4km.gguf")
    show = show_of(profile)
    info = {key: left_out if isinstance(value, list) else value for key, value in show["model_info"].items()}
    ollama.add("m:latest", show | {"model_info": info, "verbose": show})
    assert (await ollama.catalog().facts("m")).profile.metadata == profile.metadata
    assert ollama.asked[-1] == "show m:latest verbose"


@pytest.fixture
def store(tmp_path):
    """Three blobs as Ollama stores them: a model, a projector, an adapter; each file named by a hash."""
    paths = [tmp_path / f"sha256-{letter * 64}" for letter in "abc"]
    paths[0].write_bytes(gguf())
    paths[1].write_bytes(gguf({"general.architecture": "clip"}, TENSORS[:1]))
    paths[2].write_bytes(gguf({"general.architecture": "llama", "general.type": "adapter"}, TENSORS[1:2]))
    return paths


async def test_a_blob_on_this_machine_is_read_itself(ollama, store):
    """Tensors from the file, without a verbose answer; projector and adapter by their sizes."""
    model, projector, adapter = store
    modelfile = (
        f"# Modelfile\n# FROM m:latest\n\nFROM {model}\nADAPTER {adapter}\nFROM {projector}\nTEMPLATE x\nFROM /etc/passwd\n"
    )
    ollama.add("m:latest", {"modelfile": modelfile, "details": {"format": "gguf"}, "capabilities": ["embedding"]}, size=10**6)
    facts = await ollama.catalog().facts("m")
    assert facts.profile.tensors == read_header(model).tensors
    assert facts.profile.file_bytes == model.stat().st_size
    assert (facts.projector_bytes, facts.adapter_bytes) == (projector.stat().st_size, adapter.stat().st_size)
    assert facts.is_embedding
    assert ollama.asked == ["tags", "show m:latest"]


async def test_a_projector_that_cannot_be_read_gets_what_the_size_leaves(ollama, store):
    """On another machine: the list's size less the tensors is the projector's upper bound."""
    profile = read_profile(store[0])
    modelfile = f"FROM /other/sha256-{'1' * 64}\nFROM /other/sha256-{'2' * 64}\n"
    ollama.add("m:latest", show_of(profile, modelfile=modelfile), size=profile.file_bytes + 5000)
    facts = await ollama.catalog().facts("m")
    tensors_bytes = sum(tensor.bytes for tensor in profile.tensors)
    assert facts.profile.file_bytes == tensors_bytes
    assert facts.projector_bytes == profile.file_bytes + 5000 - tensors_bytes
    assert facts.adapter_bytes == 0


async def test_only_files_named_by_their_hash_are_opened(ollama, store, tmp_path):
    """A path that Ollama's store would not have is not opened here, whatever stands there."""
    other = tmp_path / "model.gguf"
    other.write_bytes(store[0].read_bytes())
    ollama.add("m:latest", {"modelfile": f"FROM {other}\n"})
    with pytest.raises(ModelError, match="names no tensors"):
        await ollama.catalog().facts("m")


async def test_a_damaged_blob_falls_back_to_the_answer(ollama, store):
    """A file that can't be parsed here costs nothing: Ollama's own table is taken."""
    profile = read_profile(store[0])
    store[0].write_bytes(b"GGUF")
    ollama.add("m:latest", show_of(profile, modelfile=f"FROM {store[0]}\n"))
    assert (await ollama.catalog().facts("m")).profile.layers == profile.layers


SMALL = show_of(read_profile(HEADERS / "qwen3-0.6b-q8.gguf"))


@pytest.mark.parametrize(
    ("show", "says"),
    [
        (SMALL | {"remote_host": "https://ollama.com:443", "remote_model": "gpt-oss:120b"}, r"runs on https://ollama\.com:443"),
        (SMALL | {"details": {"format": "safetensors"}}, "format is safetensors"),
        (SMALL | {"details": {"format": "mlx"}}, "format is mlx"),
        (SMALL | {"tensors": []}, "names no tensors"),
        (SMALL | {"tensors": None}, "names no tensors"),
        (SMALL | {"tensors": [{"name": "a", "type": "unknown", "shape": [1]}]}, "unknown GGML type"),
        (SMALL | {"tensors": [{"name": "a", "type": "F32", "shape": [-1]}]}, "no shape"),
        (SMALL | {"tensors": [{"name": "a", "type": "Q4_0", "shape": [7]}]}, "whole number"),
        (SMALL | {"tensors": [{"name": "a"}]}, "can't be understood"),
        (SMALL | {"tensors": [3]}, "can't be understood"),
        (SMALL | {"tensors": [{"name": "a", "type": "F32", "shape": [1]}]}, "no repeating layers"),
        (SMALL | {"model_info": {}}, "general.architecture"),
        (SMALL | {"model_info": None}, "general.architecture"),
        (SMALL | {"model_info": SMALL["model_info"] | {"split.count": 3}}, "split into 3 files"),
        (SMALL | {"modelfile": "FROM /a\nDRAFT /b\n"}, "draft model"),
        ({}, "names no tensors"),
    ],
)
async def test_what_cannot_be_planned_says_why_and_is_asked_once(ollama, show, says):
    """Cloud, MLX, no tensors, nonsense: ``ModelError`` with the reason, remembered for the digest."""
    ollama.add("m:latest", show)
    catalog = ollama.catalog()
    for _ in range(2):
        with pytest.raises(ModelError, match=says):
            await catalog.facts("m")
    assert [asked for asked in ollama.asked if asked == "show m:latest"] == ["show m:latest"]


async def test_a_blob_that_is_no_language_model(ollama, store):
    """An adapter pulled under a name of its own."""
    ollama.add("m:latest", {"modelfile": f"FROM {store[2]}\n"})
    with pytest.raises(ModelError, match="LoRA adapter"):
        await ollama.catalog().facts("m")


@pytest.mark.parametrize("name", ["gpt-oss:120b-cloud", "kimi-k2:cloud", "NAME:Cloud"])
async def test_cloud_names_are_known_without_asking(ollama, name):
    """Ollama itself takes the suffix for the place."""
    with pytest.raises(ModelError, match="cloud"):
        await ollama.catalog().facts(name)
    assert ollama.asked == []


async def test_models_that_are_not_there_or_run_elsewhere(ollama):
    """By the list alone, without a question about the model."""
    ollama.add("far:latest", {}, remote_host="https://example.org")
    for name, says in (("none", "has no model none"), ("far", r"runs on https://example\.org")):
        with pytest.raises(ModelError, match=says):
            await ollama.catalog().facts(name)
    assert ollama.asked == ["tags"] * 2


async def test_names_mean_what_they_mean_to_ollama(ollama):
    """Tag, case and registry may be left out or written; all are one model, asked about once."""
    ollama.add("Llama3:latest", SMALL)
    catalog = ollama.catalog()
    names = ("llama3", "LLAMA3:Latest", "library/llama3", "registry.ollama.ai/library/llama3:latest", "llama3:local")
    facts = [await catalog.facts(name) for name in names]
    assert all(fact is facts[0] for fact in facts)
    assert ollama.asked == ["tags", "show Llama3:latest"]


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("llama3", "registry.ollama.ai/library/llama3:latest"),
        ("User/Model:Q4", "registry.ollama.ai/user/model:q4"),
        ("hf.co/user/Model-GGUF:Q4_K_M", "hf.co/user/model-gguf:q4_k_m"),
        ("https://example.org:5000/ns/m", "example.org:5000/ns/m:latest"),
        ("", "registry.ollama.ai/library/:latest"),
    ],
)
def test_full_names(name, full):
    """Host, namespace, model, tag, as ``ParseName`` fills them in."""
    assert full_name(name) == full


async def test_a_name_that_is_pulled_anew_gets_new_facts(ollama):
    """The digest is looked at again after two seconds, or at once after ``forget``; facts are read again only if it changed."""
    catalog = ollama.catalog()
    ollama.add("m:latest", SMALL, digest="1" * 64)
    first = await catalog.facts("m")
    ollama.add("m:latest", show_of(read_profile(HEADERS / "llama3.1-8b-q4km.gguf")), digest="2" * 64)
    assert await catalog.facts("m") is first
    ollama.now = 2.0
    second = await catalog.facts("m")
    assert (second.digest, second.profile.n_layers) == ("2" * 64, 32)
    ollama.add("m:latest", SMALL, digest="1" * 64)
    catalog.forget()
    assert await catalog.facts("m") is first
    ollama.add("new:latest", SMALL, digest="3" * 64)
    assert (await catalog.facts("new")).digest == "3" * 64  # not in the list of a moment ago: looked up at once
    assert ollama.asked == ["tags", "show m:latest", "tags", "show m:latest", "tags", "tags", "show new:latest"]


async def test_a_change_while_the_list_is_on_its_way(ollama):
    """A list that was asked for before ``forget`` does not count as fresh after it."""
    catalog = ollama.catalog()
    ollama.add("m:latest", SMALL, digest="1" * 64)
    ollama.delay_s = 0.02
    asking = asyncio.create_task(catalog.facts("m"))
    await asyncio.sleep(0.01)
    catalog.forget()
    await asking
    ollama.add("m:latest", SMALL, digest="2" * 64)
    assert (await catalog.facts("m")).digest == "2" * 64


async def test_many_questions_at_once_are_one_exchange(ollama):
    """Single-flight: twenty requests for a model cost one list and one show, and one that leaves spoils nothing."""
    ollama.add("m:latest", SMALL)
    ollama.delay_s = 0.02
    catalog = ollama.catalog()
    tasks = [asyncio.create_task(catalog.facts("m")) for _ in range(20)]
    await asyncio.sleep(0.03)  # the first, which started the exchange, leaves in its middle
    tasks[0].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert all(result is results[1] for result in results[2:])
    assert ollama.asked == ["tags", "show m:latest"]


async def test_the_cache_is_bounded(ollama, monkeypatch):
    """The model that was not asked for longest goes first."""
    monkeypatch.setattr("proxy.models.catalog.MODELS_KEPT", 2)
    catalog = ollama.catalog()
    for i in range(3):
        ollama.add(f"m{i}:latest", SMALL, digest=f"{i}" * 64)
    for name in ("m0", "m1", "m0", "m2", "m0", "m1"):
        await catalog.facts(name)
    assert [asked for asked in ollama.asked if asked != "tags"] == [f"show m{i}:latest" for i in (0, 1, 2, 1)]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (httpx.Response(500, json={"error": "broken"}), "status 500"),
        (httpx.Response(404, content=b"<html>\n  <p>Not\n found"), "status 404: <html> <p>Not found$"),
        (httpx.Response(200, content=b"<html>"), "no JSON"),
        (httpx.Response(200, content=b"[" * 100_000), "no JSON"),
        (httpx.Response(200, content=b"[]"), "no object"),
        (httpx.ConnectError("refused"), "does not answer /api/tags: refused"),
        (httpx.ReadTimeout(""), "does not answer /api/tags: ReadTimeout"),
    ],
)
async def test_an_ollama_that_is_down_or_talks_nonsense(ollama, answer, says):
    """``UpstreamError``, which is not remembered: the next question is asked again."""

    async def respond(request: httpx.Request) -> httpx.Response:
        if broken:
            if isinstance(answer, Exception):
                raise answer
            return answer
        return await ollama(request)

    ollama.add("m:latest", SMALL)
    catalog = Catalog(client(respond))
    broken = True
    with pytest.raises(UpstreamError, match=says):
        await catalog.facts("m")
    broken = False
    assert (await catalog.facts("m")).digest == DIGEST


async def test_a_list_of_nonsense_has_no_models():
    """Fields of wrong types are as good as missing."""
    for models in (None, 3, [3, {}, {"name": 3, "digest": 4}, {"name": "m", "digest": ""}]):
        catalog = Catalog(client(lambda _, models=models: httpx.Response(200, json={"models": models})))
        with pytest.raises(ModelError, match="has no model"):
            await catalog.facts("m")
