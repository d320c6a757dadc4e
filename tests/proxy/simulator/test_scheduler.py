"""Which models are loaded, where, and when they are loaded again: Ollama's rules on a simulated RTX 5090 and RTX 3090."""

import time

import httpx
import pytest

from planner.hardware import Gpu, Host, Rig
from planner.units import GIB, MIB
from proxy.simulator import Simulator, create_app, demo_models
from proxy.simulator.placement import Environment
from tests.servers import serve

FAST = Gpu(
    uuid="GPU-5090",
    name="NVIDIA GeForce RTX 5090",
    total_bytes=32607 * MIB,
    free_bytes=31500 * MIB,
    compute_capability=(12, 0),
    sm_count=170,
    clock_mhz=2407,
    bandwidth_bytes_per_s=1_792_000_000_000,
)
SLOW = Gpu(
    uuid="GPU-3090",
    name="NVIDIA GeForce RTX 3090",
    total_bytes=24576 * MIB,
    free_bytes=23700 * MIB,
    compute_capability=(8, 6),
    sm_count=82,
    clock_mhz=1695,
    bandwidth_bytes_per_s=936_000_000_000,
)
HOST = Host(total_bytes=64 * GIB, free_bytes=56 * GIB, bandwidth_bytes_per_s=80_000_000_000)
PAIR = Rig(gpus=(FAST, SLOW), host=HOST)
MODELS = demo_models()
SMALL, MIDDLE, BIG, MOE = "llama3.1:8b", "qwen2.5:32b", "llama3.3:70b", "qwen3:30b-a3b"


class Ollama:
    """A running simulator, and what the tests ask of it."""

    def __init__(self, simulator, client):
        self.simulator = simulator
        self.client = client

    def ask(self, model, keep_alive=None, **options):
        body = {"model": model, "prompt": "x", "stream": False, "options": options}
        if keep_alive is not None:
            body["keep_alive"] = keep_alive
        return self.client.post("/api/generate", json=body)

    def shares(self, model, **options):
        """Layers of each card after asking ``model``."""
        answer = self.ask(model, **options)
        assert answer.status_code == 200, answer.text
        return next(r for r in self.simulator.scheduler.runners if r.model.name == model).load.placement.shares

    def loaded(self):
        return {entry["name"] for entry in self.client.get("/api/ps").json()["models"]}

    def count(self, kind, model=None):
        return self.simulator.scheduler.count(kind, model)


@pytest.fixture(scope="module")
def server():
    """One server for all tests; each puts its own simulator behind it."""
    app = create_app(Simulator(PAIR))
    with serve(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield app, client


@pytest.fixture
def start(server):
    """Starts an Ollama on a rig, of an era, with an environment."""
    app, client = server

    def start_one(rig=PAIR, *, time_scale=0.0, **environment):
        app.simulator = Simulator(rig, MODELS, environment=Environment(**environment), time_scale=time_scale)
        return Ollama(app.simulator, client)

    return start_one


@pytest.fixture
def ollama(start):
    return start()


@pytest.fixture
def older(start):
    return start(era="runner")


def is_solo(shares, gpu):
    return shares[gpu] > 0 and sum(shares) == shares[gpu]


# One card or several


def test_a_small_model_goes_to_the_card_with_the_most_free_memory_whatever_its_speed(ollama):
    assert is_solo(ollama.shares(SMALL, num_ctx=8192), 0)
    ollama.simulator.scheduler.expire(ollama.simulator.store.find(SMALL))
    ollama.simulator.gpus.occupy(0, 10 * GIB)  # a game: the 5090 now has less free memory than the 3090
    assert is_solo(ollama.shares(SMALL, num_ctx=8192), 1)


def test_a_model_that_fits_the_fast_card_is_split_when_it_is_predicted_over_80_percent(ollama):
    """32B at a context of 32768: 27.4 GiB predicted, 80 % of the 5090's free memory is 24.6 GiB."""
    shares = ollama.shares(MIDDLE, num_ctx=32768)
    assert min(shares) > 0
    assert sum(shares) == 65


def test_main_gpu_pins_to_one_card(ollama):
    assert is_solo(ollama.shares(MIDDLE, num_ctx=32768, main_gpu=0), 0)
    assert is_solo(ollama.shares(SMALL, num_ctx=4096, main_gpu=1), 1)


def test_a_70b_is_spread_over_both_cards(ollama):
    shares = ollama.shares(BIG, num_ctx=8192)
    assert min(shares) > 0
    assert sum(shares) == 81


def test_num_gpu_zero_stays_on_the_cpu(ollama):
    assert ollama.shares(SMALL, num_ctx=4096, num_gpu=0) == (0, 0)
    entry = ollama.client.get("/api/ps").json()["models"][0]
    assert entry["size_vram"] == 0
    assert entry["size"] > 4 * GIB


def test_tensor_split_is_ignored_by_stock_and_honoured_by_a_fork(start):
    ollama = start()
    stock = ollama.shares(BIG, num_ctx=4096)
    assert ollama.shares(BIG, num_ctx=4096, tensor_split="70,30") == stock
    assert ollama.count("launch") == 1
    fork = start(honours_tensor_split=True)
    shares = fork.shares(MIDDLE, num_ctx=4096, tensor_split="70,30")
    assert shares[0] / sum(shares) == pytest.approx(0.7, abs=0.02)
    fork.shares(MIDDLE, num_ctx=4096)
    assert fork.count("launch") == 2
    assert fork.ask(MIDDLE, num_ctx=4096, tensor_split="all").json() == {"error": 'invalid tensor_split "all"'}
    assert "CUDA1" in fork.ask(BIG, num_ctx=4096, tensor_split="0,1").json()["error"]


def test_spread_uses_every_card(start):
    assert min(start(sched_spread=True).shares(SMALL, num_ctx=4096)) > 0


def test_the_older_era_knows_no_main_gpu_and_no_80_percent(older):
    shares = older.shares(MIDDLE, num_ctx=8192, main_gpu=1)
    assert is_solo(shares, 0)


def test_the_older_era_splits_what_one_card_cannot_hold(older):
    shares = older.shares(BIG, num_ctx=8192)
    assert min(shares) > 0
    assert sum(shares) == 81


def test_the_older_era_offloads_as_many_layers_as_num_gpu_says(older):
    assert sum(older.shares(SMALL, num_ctx=4096, num_gpu=20)) == 20


def test_without_cards_everything_runs_on_the_cpu(start):
    assert start(Rig(gpus=(), host=HOST)).shares(SMALL, num_ctx=4096) == ()


# Speed


def test_the_fast_card_alone_answers_faster_than_the_split_and_the_slow_card(ollama):
    def tokens_per_s(**options):
        answer = ollama.ask(MIDDLE, **options).json()
        return answer["eval_count"] / answer["eval_duration"] * 1e9

    fast = tokens_per_s(num_ctx=32768, main_gpu=0)
    split = tokens_per_s(num_ctx=32768)
    slow = tokens_per_s(num_ctx=4096, main_gpu=1)
    assert fast > 1.2 * split > 1.2 * slow


def test_loaded_models_take_memory_and_give_it_back(ollama):
    before = ollama.simulator.rig()
    ollama.ask(SMALL, num_ctx=4096)
    taken = before.gpus[0].free_bytes - ollama.simulator.rig().gpus[0].free_bytes
    entry = ollama.client.get("/api/ps").json()["models"][0]
    assert entry["size_vram"] <= taken <= entry["size_vram"] + GIB  # CUDA itself takes some
    ollama.client.post("/api/generate", json={"model": SMALL, "keep_alive": 0})
    assert ollama.simulator.rig() == before


# Loading again


def test_the_same_options_never_load_again(ollama):
    for _ in range(3):
        ollama.ask(SMALL, num_ctx=4096, main_gpu=0, temperature=0.5)
    ollama.client.post("/api/chat", json={"model": SMALL, "messages": [], "options": {"num_ctx": 4096, "main_gpu": 0}})
    assert (ollama.count("load"), ollama.count("reload")) == (1, 0)


def test_an_option_that_comes_and_goes_loads_again_each_time(ollama):
    """What a proxy must never do: inject ``main_gpu`` into some requests and not into others."""
    for options in ({}, {"main_gpu": 0}, {}, {"main_gpu": 0}):
        ollama.ask(SMALL, **options)
    assert (ollama.count("load"), ollama.count("reload")) == (1, 3)
    assert ollama.count("unload") == 3


def test_shift_false_and_back_are_two_loads_since_0_30(start):
    for era, reloads in (("llama-server", 2), ("runner", 0)):
        started = start(era=era)
        for shift in (True, False, True):
            started.client.post("/api/generate", json={"model": SMALL, "prompt": "x", "stream": False, "shift": shift})
        assert started.count("reload") == reloads


def test_openai_clients_without_options_load_again_what_was_loaded_with_them(ollama):
    ollama.ask(SMALL, main_gpu=0)
    ollama.client.post("/v1/chat/completions", json={"model": SMALL, "messages": [{"role": "user", "content": "Hi"}]})
    assert ollama.count("reload") == 1


def test_a_derived_model_with_the_same_options_shares_the_runner(ollama):
    """Measured with a real server: in either order, no restart."""
    created = {"model": "pinned", "from": SMALL, "parameters": {"main_gpu": 0, "num_gpu": 99}}
    ollama.client.post("/api/create", json=created)
    ollama.ask("pinned")
    ollama.ask(SMALL, main_gpu=0, num_gpu=99)
    ollama.client.post("/v1/chat/completions", json={"model": "pinned", "messages": [{"role": "user", "content": "Hi"}]})
    assert ollama.count("launch") == 1
    assert ollama.loaded() == {"pinned:latest"}


# Room


def test_a_model_that_wants_more_than_80_percent_of_what_is_left_evicts_idle_ones(ollama):
    ollama.ask(MIDDLE, num_ctx=4096)
    ollama.ask(MOE, num_ctx=4096)
    ollama.ask(BIG, num_ctx=4096)
    assert ollama.loaded() == {BIG}
    assert ollama.count("evict") == 2


def test_small_models_stay_beside_each_other(ollama):
    for model in (SMALL, "qwen3:0.6b", "all-minilm:22m"):
        if model.startswith("all-minilm"):
            ollama.client.post("/api/embed", json={"model": model, "input": "x"})
        else:
            ollama.ask(model, num_ctx=4096)
    assert ollama.loaded() == {SMALL, "qwen3:0.6b", "all-minilm:22m"}
    assert ollama.count("evict") == 0


def test_a_model_in_use_is_not_evicted_before_its_answer_is_complete(start):
    ollama = start(time_scale=0.02)
    ask = {"model": MIDDLE, "prompt": "x", "options": {"num_ctx": 4096}}
    with ollama.client.stream("POST", "/api/generate", json=ask) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert ollama.client.post("/api/generate", json={"model": BIG, "options": {"num_ctx": 4096}}).status_code == 200
        assert '"done":true' in list(lines)[-1]
    assert ollama.count("evict", MIDDLE) == 1


# Out of memory


def test_a_load_that_does_not_fit_is_refused_in_llama_servers_words(ollama):
    """32B at 32768 wants 28 GiB; a stated context is never made smaller, and a stated ``num_gpu`` turns ``--fit`` off."""
    answer = ollama.ask(MIDDLE, num_ctx=32768, main_gpu=1, num_gpu=99)
    assert answer.status_code == 500
    assert answer.json()["error"].startswith(
        "llama-server process has terminated: exit status 1: cudaMalloc failed: out of memory\n"
    )
    assert "failed to allocate CUDA0 buffer of size " in answer.json()["error"]  # the only device that it can see
    assert ollama.count("launch") == 1
    assert ollama.loaded() == set()
    assert ollama.simulator.rig() == PAIR


def test_main_gpu_alone_leaves_to_the_cpu_what_the_card_cannot_hold(ollama):
    """``--fit`` stays on: nothing fails, and the answer is slow."""
    shares = ollama.shares(MIDDLE, num_ctx=32768, main_gpu=1)
    assert shares[0] == 0 < shares[1] < 65
    entry = ollama.client.get("/api/ps").json()["models"][0]
    assert entry["size_vram"] < entry["size"]


def test_a_failed_load_is_tried_once_more_without_the_other_models(ollama):
    ollama.ask(SMALL, num_ctx=8192, main_gpu=1)
    assert ollama.shares(MIDDLE, num_ctx=8192, main_gpu=1, num_gpu=50)[1] > 0  # a stated num_gpu skips the 80 % check
    assert ollama.loaded() == {MIDDLE}
    assert (ollama.count("out of memory"), ollama.count("evict"), ollama.count("launch", MIDDLE)) == (1, 1, 2)


def test_an_automatic_context_is_made_smaller_once_and_the_client_sees_no_error(ollama):
    """56 GiB in all: 131072 tokens, the trained context; on the 3090 alone only 32768 fit with the weights of an 8B model."""
    ollama.simulator.gpus.occupy(1, 4 * GIB)
    answer = ollama.ask(SMALL, main_gpu=1, num_gpu=99)
    assert answer.status_code == 200
    assert ollama.client.get("/api/ps").json()["models"][0]["context_length"] == 32768
    assert (ollama.count("out of memory"), ollama.count("launch")) == (1, 2)


def test_the_older_era_says_that_no_layout_can_be_allocated(older):
    answer = older.ask(BIG, num_ctx=65536, num_gpu=81)
    assert (answer.status_code, answer.json()) == (500, {"error": "memory layout cannot be allocated with num_gpu = 81"})


# Keep-alive


def test_a_model_leaves_when_its_keep_alive_is_over(ollama):
    ollama.ask(SMALL, keep_alive="150ms")
    assert ollama.loaded() == {SMALL}
    time.sleep(0.3)
    assert ollama.loaded() == set()


def test_a_new_request_starts_the_keep_alive_anew(ollama):
    ollama.ask(SMALL, keep_alive="300ms")
    time.sleep(0.2)
    ollama.ask(SMALL)
    time.sleep(0.2)
    assert ollama.loaded() == {SMALL}


def test_keep_alive_zero_unloads_after_the_answer_and_a_negative_one_never(ollama):
    ollama.ask(SMALL, keep_alive=0)
    assert ollama.loaded() == set()
    ollama.ask(SMALL, keep_alive=-1)
    assert ollama.client.get("/api/ps").json()["models"][0]["expires_at"] > "2300"
