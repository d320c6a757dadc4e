"""The clients that people use understand the simulator: Ollama's own, OpenAI's and Anthropic's."""

import anthropic
import ollama
import openai
import pytest

from planner.hardware import Rig
from proxy.simulator import Simulator, create_app, demo_models
from proxy.simulator.placement import Environment
from tests.proxy.simulator.recorded import H200, HOST
from tests.servers import serve

MODEL = "qwen3:0.6b"
HI = [{"role": "user", "content": "Hi"}]


def get_weather(city: str) -> str:
    """Tells the weather.

    Args:
        city: where
    """
    return f"sunny in {city}"


@pytest.fixture(scope="module", params=["runner", "llama-server"])
def url(request):
    simulator = Simulator(Rig(gpus=(H200,), host=HOST), demo_models(), environment=Environment(era=request.param))
    with serve(create_app(simulator)) as base_url:
        yield base_url


@pytest.fixture
def client(url):
    client = ollama.Client(host=url)
    yield client
    client._client.close()


def test_ollamas_client_generates_and_chats_whole_and_in_a_stream(client):
    whole = client.generate(MODEL, "Why?").response
    assert "".join(part.response for part in client.generate(MODEL, "Why?", stream=True)) == whole
    assert client.chat(MODEL, HI).message.content == "".join(part.message.content for part in client.chat(MODEL, HI, stream=True))


def test_ollamas_client_gets_tool_calls(client):
    calls = client.chat(MODEL, [{"role": "user", "content": "the weather in Rome?"}], tools=[get_weather]).message.tool_calls
    assert [(call.function.name, dict(call.function.arguments)) for call in calls] == [("get_weather", {"city": "simulated"})]


def test_ollamas_client_looks_after_the_store(client):
    client.create("mine", from_=MODEL, parameters={"num_ctx": 2048})
    client.copy("mine", "copied")
    client.generate("copied", "x")
    assert {"mine:latest", "copied:latest"} <= {model.model for model in client.list().models}
    assert "num_ctx" in client.show("mine").parameters
    assert "copied:latest" in {model.model for model in client.ps().models}
    client.delete("copied")
    client.delete("mine")
    with pytest.raises(ollama.ResponseError, match="model 'mine' not found"):
        client.generate("mine", "x")


def test_ollamas_client_embeds(client):
    assert len(client.embed("all-minilm:22m", ["a", "b"]).embeddings) == 2


def test_openais_client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(model=MODEL, messages=HI).choices[0].message.content
        stream = client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in stream) == whole
        assert client.responses.create(model=MODEL, input="Hi").output_text
        assert len(client.embeddings.create(model="all-minilm:22m", input="a", dimensions=8).data[0].embedding) == 8
        assert MODEL in {model.id for model in client.models.list()}
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nope", messages=HI)


def test_anthropics_client(url):
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        whole = client.messages.create(model=MODEL, max_tokens=500, messages=HI).content[0].text
        with client.messages.stream(model=MODEL, max_tokens=500, messages=HI) as stream:
            assert "".join(stream.text_stream) == whole
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(model="nope", max_tokens=5, messages=HI)
