"""Each recorded exchange, made again with the simulator over a real socket, gets the recorded answer."""

import json

import pytest

from proxy.simulator import create_app
from tests.proxy import recordings
from tests.proxy.simulator.recorded import RecordedWords, recorded_simulator
from tests.servers import serve


@pytest.fixture(scope="module")
def replay():
    """Answers by exchange, made in the recorded order against one server of each version."""
    answers = {}
    for version in recordings.VERSIONS:
        words = RecordedWords()
        with serve(create_app(recorded_simulator(version, words))) as url:
            for exchange in recordings.load(version):
                words.exchange = exchange
                answers[str(exchange)] = recordings.send(url, exchange)
    return answers


EXCHANGES = [exchange for version in recordings.VERSIONS for exchange in recordings.load(version)]


def test_there_are_sixty_exchanges_of_each_version():
    """The copy of the recordings is whole."""
    assert [len(recordings.load(version)) for version in recordings.VERSIONS] == [60, 60]


@pytest.mark.parametrize("exchange", EXCHANGES, ids=str)
def test_status(replay, exchange):
    assert replay[str(exchange)].status == exchange.answer.status


@pytest.mark.parametrize("exchange", EXCHANGES, ids=str)
def test_headers(replay, exchange):
    """The same names with the same values; whether a length is stated or chunks are sent agrees too."""
    answer = replay[str(exchange)]
    assert recordings.comparable_headers(answer) == recordings.comparable_headers(exchange.answer)


@pytest.mark.parametrize("exchange", EXCHANGES, ids=str)
def test_body(replay, exchange):
    """The same JSON, lines or events, in the same order of keys, up to clocks, chance and vectors."""
    ours = recordings.comparable_body(exchange, replay[str(exchange)].body)
    theirs = recordings.comparable_body(exchange, exchange.answer.body)
    assert ours == theirs
    assert json.dumps(ours) == json.dumps(theirs)


@pytest.mark.parametrize("name", ["ps-loaded", "ps-derived"])
@pytest.mark.parametrize("version", recordings.VERSIONS)
def test_the_size_of_the_loaded_model_is_the_recorded_one(replay, version, name):
    """Within 1 %: 0.32 on a GPU with a context of 8192 and a batch of 1024, 0.24 on the CPU with 4096."""
    exchange = recordings.exchange(version, name)
    ours = json.loads(replay[str(exchange)].body)["models"][0]
    recorded = json.loads(exchange.answer.body)["models"][0]
    assert ours["size"] == pytest.approx(recorded["size"], rel=0.01)
    assert ours["size_vram"] == pytest.approx(recorded["size_vram"], rel=0.01)
