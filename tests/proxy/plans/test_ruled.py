"""Rules, contexts and several models, before a simulated Ollama on real sockets: what is asked of it, and what it loads anew."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest
from click.testing import CliRunner

from proxy.cli import main
from proxy.config import rulefile
from proxy.gpus.static import StaticSource
from proxy.placing import steady
from proxy.simulator import Simulator, build_model, create_app, demo_models
from proxy.simulator.placement import Environment
from proxy.simulator.replies import Spoken
from tests.proxy.launcher.test_launching import make_machine, wait_until
from tests.proxy.upstreams import proxy_before
from tests.servers import serve

RIG = StaticSource.from_arguments(("RTX 5090:31500MiB", "RTX 3090:23700MiB")).rig()
CHAT, OTHER, LESSER, SMALL, EMBED = "qwen2.5:32b", "phi4:14b", "gemma2:27b", "qwen3:0.6b", "all-minilm:22m"
MODELS = [model for model in demo_models() if model.name in {CHAT, OTHER, LESSER, SMALL, EMBED}]
LARGE_EMBED, LONG_EMBED = "embed:14b", "embed:8b"
for name, pooled in ((LARGE_EMBED, OTHER), (LONG_EMBED, "llama3.1:8b")):
    profile = next(model.profile for model in demo_models() if model.name == pooled)
    profile = replace(profile, metadata={**profile.metadata, f"{profile.architecture}.pooling_type": 3})
    MODELS.append(build_model(name, profile, capabilities=("embedding",)))
CHAT_CTX = {"num_ctx": 4096, "num_predict": 1}
HEADER = "x-lopsided-plan"


class Stage:
    """A simulated Ollama, the proxy in front of it, and the file of its rules."""

    def __init__(self, simulator, url, file):
        self.simulator, self.url, self.file = simulator, url, file
        self.client = httpx.Client(base_url=url, timeout=30, trust_env=False)

    def ask(self, model, *, path="/api/generate", **options):
        """The plan of a request, which has to be answered."""
        body = {"model": model, "stream": False, "options": options or {"num_predict": 1}}
        body |= {"input": "x"} if path == "/api/embed" else {"prompt": "x"}
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.headers[HEADER]

    def embed(self):
        return self.ask(EMBED, path="/api/embed")

    def count(self, kind, model=None):
        return self.simulator.scheduler.count(kind, model)

    def sent(self):
        asked = [r for r in self.simulator.requests if r.method == "POST" and r.path.startswith(("/api/gen", "/api/em", "/v1"))]
        return json.loads(asked[-1].body).get("options")

    def context(self, model):
        return next(r.load.settings.num_ctx for r in self.simulator.scheduler.runners if r.model.name == model)

    def cards(self, model):
        """The cards on which ``model`` lies."""
        return next(r.load.placement.order for r in self.simulator.scheduler.runners if r.model.name == model)

    def pin(self, model):
        self.client.post("/api/generate", json={"model": model, "keep_alive": -1, "options": {}}).raise_for_status()


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Opens a stage with rules."""
    monkeypatch.setattr(rulefile, "LOOK_S", 0.05)

    @contextmanager
    def open_stage(rules="", *, rig=RIG, source=None, parallel=1, **settings):
        file = tmp_path / "lopsided.toml"
        file.write_text(rules)
        monkeypatch.setenv("LOPSIDED_CONFIG", str(file))
        simulator = Simulator(rig, MODELS, environment=Environment(keep_alive_s=60, num_parallel=parallel))
        with serve(create_app(simulator)) as ollama, proxy_before(ollama, source=source or simulator, **settings) as url:
            it = Stage(simulator, url, file)
            with it.client:
                yield it

    return open_stage


def test_a_model_goes_to_the_gpu_that_its_rule_names(stage):
    with stage(f'[models."phi4*"]\ngpu = "RTX 3090"\n[models."{CHAT}"]\ngpu = "{RIG.gpus[0].uuid}"') as it:
        assert it.ask(OTHER, num_ctx=4096).startswith(("solo CUDA1", "stock"))
        assert it.cards(OTHER) == (1,)
        it.ask(CHAT, **CHAT_CTX)
        assert it.cards(CHAT) == (0,)


def test_a_model_that_its_rules_gpu_does_not_hold_is_searched_for(stage):
    with stage(f'[models."{CHAT}"]\ngpu = "RTX 3090"') as it:
        assert it.ask(CHAT, num_ctx=32768).startswith("solo CUDA0")
        reasons = it.client.get("/lopsided/plan", params={"model": CHAT, "num_ctx": 32768}).json()["reasons"]
        assert reasons[0] == f'lopsided.toml: gpu = RTX 3090 ([models."{CHAT}"])'
        assert reasons[1].startswith("does not fit alone on")


def test_a_reserve_keeps_a_card_free_for_others(stage):
    with stage('reserve = { "RTX 5090" = "20GiB" }') as it:
        it.ask(CHAT, **CHAT_CTX)
        assert it.cards(CHAT) == (1,)
        assert it.simulator.rig().gpus[0].free_bytes >= 20 * 2**30


def test_off_leaves_a_model_to_ollama(stage):
    with stage(f'[models."{CHAT}"]\noff = true') as it:
        assert it.ask(CHAT, **CHAT_CTX) == "stock; a rule switches it off"
        assert "main_gpu" not in it.sent()


def test_a_rule_that_changes_moves_the_model_at_its_next_request_and_no_other(stage):
    with stage() as it:
        it.ask(OTHER, num_ctx=4096)
        it.ask(SMALL, num_ctx=4096)
        assert it.cards(OTHER) == (0,)
        it.file.write_text(f'[models."{OTHER}"]\ngpu = "RTX 3090"')
        time.sleep(0.1)
        for _ in range(3):
            it.ask(OTHER, num_ctx=4096)
            it.ask(SMALL, num_ctx=4096)
        assert it.cards(OTHER) == (1,)
        assert (it.count("reload", OTHER), it.count("reload", SMALL)) == (1, 0)
        it.file.write_text("[models.x]\nboost = 9")
        time.sleep(0.1)
        it.ask(OTHER, num_ctx=4096)
        assert it.count("reload") == 1  # a broken file changes nothing


def test_a_rule_that_changes_during_a_request_waits_for_its_end(stage):
    # shows: neither another card nor `off` has Ollama load anew what somebody is reading
    with stage(f'[models."{OTHER}"]\ngpu = "RTX 5090"', parallel=2) as it:
        it.ask(OTHER, num_ctx=4096)
        it.simulator.speaker = lambda *_, **__: Spoken(pieces=(" on",) * 2000, count=2000, reason="stop", calls=())
        it.simulator.scheduler.time_scale = 1.0
        body = {"model": OTHER, "prompt": "x", "options": {"num_ctx": 4096, "num_predict": 2000}}
        with it.client.stream("POST", "/api/generate", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            for rules in ('gpu = "RTX 3090"', "off = true"):
                it.file.write_text(f'[models."{OTHER}"]\n{rules}')
                time.sleep(0.1)
                body["prompt"] = "and"
                with it.client.stream("POST", "/api/generate", json=body) as second:
                    assert second.headers[HEADER] == answer.headers[HEADER]
            assert (it.cards(OTHER), it.count("reload"), next(lines)[:1]) == ((0,), 0, "{")
            it.simulator.scheduler.time_scale = 0.0
        wait_until(lambda: it.ask(OTHER, num_ctx=4096) == "stock; a rule switches it off")


BROKEN = {
    "wrong type": b"[models.x]\noff = 7",
    "unknown key": b"[models.x]\ngppu = 'RTX 3090'",
    "misspelled": b"prioritty = ['x']",
    "no TOML": b"[models.x\n",
    "not UTF-8": b"# \xff",
    "endless": b"#" * 300_000,
    "an enormous reserve": b"reserve = { x = '" + b"9" * 400 + b"GiB' }",
    "deep": b"a = " + b"[" * 5000,
}


def test_a_broken_edit_keeps_the_rules_of_before_says_so_once_and_answers(stage, caplog):
    with stage(f'[models."{OTHER}"]\ngpu = "RTX 3090"') as it:
        for content in BROKEN.values():
            it.file.write_bytes(content)
            caplog.clear()
            for _ in range(3):
                time.sleep(0.06)
                assert it.ask(OTHER, num_ctx=4096).startswith(("solo CUDA1", "stock; auto"))
            assert [record.levelname for record in caplog.records if "rules of before" in record.message] == ["WARNING"]
        it.file.unlink()
        it.file.mkdir()
        time.sleep(0.06)
        it.ask(OTHER, num_ctx=4096)
        assert (it.cards(OTHER), it.count("reload")) == ((1,), 0)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ('reserve = { "RTX 5090" = "99GiB" }', "the reserve leaves nothing of"),
        ('reserve = { "RTX" = "99GiB" }', "the reserve leaves nothing of"),
        ('[models."*"]\ngpu = "RTX"', "gpu = 'RTX' means 2 GPUs here: "),
        ('[models."*"]\ngpu = "RTX 4090"', "a rule names the GPU 'RTX 4090', which is not here"),
        ('[models."*"]\ngpu = "RTX 3090"\nreserve = { "RTX 3090" = "23GiB" }', "does not fit alone on"),
        (f'keep_together = ["{CHAT}", "{OTHER}", "{LESSER}"]', "there is no room for the whole group"),
        ('[models."*"]\ncontext = 1', "context = 1"),
        ('[models."*"]\ncontext = 2147483647', "context = 2147483647"),
        ('[models."*"]\nboost = 1.3', "boost = 1.3"),
        ('[models."*"]\noff = true', "off = True"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_said_and_the_request_answered(stage, rules, said):
    with stage(rules) as it:
        it.ask(OTHER, num_ctx=16384)
        it.ask(CHAT, num_predict=1)
        plan = it.client.get("/lopsided/plan", params={"model": CHAT, "num_ctx": 16384})
        assert plan.status_code == 200
        assert any(said in reason for reason in plan.json()["reasons"])


def test_names_that_no_model_has_change_nothing_and_the_doctor_says_so(stage):
    with stage(f'priority = ["nobody"]\nkeep_together = ["{CHAT}", "absent:1b"]') as it:
        it.ask(CHAT, **CHAT_CTX)
        assert it.cards(CHAT) == (0,)
        found = CliRunner(env={"LOPSIDED_UPSTREAM": it.url, "LOPSIDED_HOST": "127.0.0.1:1"}).invoke(main, ["doctor", "--json"])
        texts = [finding["text"] for finding in json.loads(found.stdout)["findings"] if finding["subject"] == "rules"]
        strangers = [text for text in texts if "is no model that Ollama has" in text]
        assert [text.split("'")[1] for text in strangers] == ["nobody", "absent:1b"]


def test_a_wrong_rule_is_a_finding_of_the_doctor_and_refused_by_serve(stage):
    with stage() as it:
        it.file.write_text("[models.x]\noff = 7")
        environment = {"LOPSIDED_UPSTREAM": it.url, "LOPSIDED_HOST": "127.0.0.1:1"}
        found = CliRunner(env=environment).invoke(main, ["doctor", "--json"])
        texts = [finding["text"] for finding in json.loads(found.stdout)["findings"] if finding["level"] == "fail"]
        assert f"{it.file}:2: off = 7: true or false" in texts
        refused = CliRunner(env=environment).invoke(main, ["serve"])
        assert (refused.exit_code, f"{it.file}:2: off = 7" in refused.stderr) == (2, True)


def test_a_rules_context_goes_into_every_request_that_sets_none(stage):
    with stage(f'[models."{OTHER}"]\ncontext = 6144') as it:
        assert it.ask(OTHER).endswith("; context 6144")
        it.client.post("/v1/completions", json={"model": OTHER, "prompt": "x", "max_tokens": 1}).raise_for_status()
        it.ask(OTHER, num_predict=2)
        assert (it.context(OTHER), it.count("load"), it.count("reload")) == (6144, 1, 0)
        it.ask(OTHER, num_ctx=4096)
        assert it.context(OTHER) == 4096  # a client's own context stands


def test_fit_takes_the_largest_context_that_keeps_the_fast_card(stage):
    with stage(context="fit") as it:
        assert it.ask(CHAT).startswith("solo CUDA0")
        fitted = it.context(CHAT)
        assert it.cards(CHAT) == (0,)
        assert 32768 < fitted < 131072
        body = {"model": CHAT, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        it.client.post("/v1/chat/completions", json=body).raise_for_status()
        it.ask(CHAT)
        assert (it.count("load"), it.count("reload")) == (1, 0)
        plan = it.client.get("/lopsided/plan", params={"model": CHAT}).json()
        assert plan["request"]["num_ctx"] == fitted == plan["delivery"]["options"]["num_ctx"]


def test_every_endpoint_gets_the_same_fitted_context_and_one_load(stage):
    with stage(context="fit") as it:
        chat = {"model": CHAT, "messages": [{"role": "user", "content": "x"}], "stream": False}
        completion = {"model": CHAT, "prompt": "x", "max_tokens": 1}
        for path, body in {
            "/v1/chat/completions": {**chat, "max_tokens": 1},
            "/api/generate": {"model": CHAT, "prompt": "x", "stream": False},
            "/api/chat": chat,
            "/api/embed": {"model": CHAT, "input": "x"},
            "/api/embeddings": {"model": CHAT, "prompt": "x"},
            "/v1/completions": completion,
        }.items():
            answer = it.client.post(path, json=body)
            assert answer.status_code == 200 or "embeddings" in answer.text  # which a chat model has none of, but is loaded for
            (loaded,) = it.simulator.scheduler.runners
            assert answer.headers[HEADER].endswith(f"; context {loaded.load.settings.num_ctx}"), path
        assert (it.count("load"), it.count("reload")) == (1, 0)


def test_a_context_that_the_client_or_the_model_sets_stands(stage):
    with stage(f'[models."*"]\ncontext = 6144\n[models."{OTHER}"]\ncontext = "fit"', context="fit") as it:
        made = {"model": "mine", "from": OTHER, "parameters": {"num_ctx": 5120}, "stream": False}
        it.client.post("/api/create", json=made).raise_for_status()
        it.ask("mine")
        assert "num_ctx" not in it.sent()
        it.client.post("/v1/completions", json={"model": "mine", "prompt": "x", "max_tokens": 1}).raise_for_status()
        assert next(r for r in it.simulator.scheduler.runners).load.settings.num_ctx == 5120
        for num_ctx in (0, 2048):
            it.ask(SMALL, num_ctx=num_ctx)
            assert it.sent()["num_ctx"] == num_ctx


def test_keep_never_touches_the_context(stage):
    with stage() as it:
        it.ask(CHAT)
        assert it.context(CHAT) == 131072
        assert "num_ctx" not in (it.sent() or {})


def test_fit_stays_within_ollamas_own_context_length(stage, monkeypatch):
    monkeypatch.setenv("OLLAMA_CONTEXT_LENGTH", "8192")
    with stage(context="fit") as it:
        it.ask(CHAT)
        assert it.context(CHAT) in (8192, 131072)  # the simulated Ollama does not have the variable
        assert it.client.get("/lopsided/plan", params={"model": CHAT}).json()["request"]["num_ctx"] == 8192


@pytest.mark.parametrize("first", ["chat", "embed"])
def test_chat_and_embed_by_turns_load_once_and_chat_keeps_the_fast_card(stage, first):
    # shows: ollama issues 16391 and 12247, whichever of them comes first
    with stage() as it:
        it.embed() if first == "embed" else it.ask(CHAT, **CHAT_CTX)
        for _ in range(2):
            it.ask(CHAT, **CHAT_CTX)
            it.embed()
        settled = len(it.simulator.scheduler.history)
        for _ in range(4):
            it.ask(CHAT, **CHAT_CTX)
            it.embed()
        assert (it.cards(CHAT), it.cards(EMBED)) == ((0,), (1,))
        assert len(it.simulator.scheduler.history) == settled  # nothing loads, reloads or is evicted
        assert (it.count("reload"), it.count("load", CHAT)) == (0, 1)


def test_a_large_embedding_model_goes_where_nobody_is_unloaded_for_it(stage):
    # shows: it fits what is left of either card; on the fast one Ollama unloads the chat model for it, which then has to leave
    with stage() as it:
        for _ in range(2):
            it.ask(LESSER, num_ctx=4096)
            it.ask(LARGE_EMBED, path="/api/embed", num_ctx=16384)
        assert (it.cards(LESSER), it.cards(LARGE_EMBED)) == ((0,), (1,))
        assert (it.count("load"), it.count("evict")) == (2, 0)


def test_an_embedding_model_stays_as_stock_has_it_where_any_better_place_costs_another_model(stage):
    # shows: it fits the slow card, but not 80 % of it: Ollama would unload the chat model; it splits it over what all have left
    with stage(rig=StaticSource.from_arguments(("RTX 5090", "RTX 3090", "RTX 3060 12GB")).rig()) as it:
        for _ in range(2):
            it.ask(CHAT, num_ctx=4096)
            told = it.ask(LONG_EMBED, path="/api/embed", num_ctx=114688)
        assert it.cards(CHAT) == (0,)
        assert (it.count("load"), it.count("evict")) == (2, 0)
        assert told.startswith("stock; auto")


def test_an_embedding_model_is_not_left_where_stock_would_run_out_of_memory(stage):
    # shows: beside these two stock's split overruns the fast card by a little
    with stage() as it:
        it.ask(LESSER, num_ctx=4096)
        it.ask(SMALL, num_ctx=16384)
        it.ask(LONG_EMBED, path="/api/embed", num_ctx=131072)
        assert it.count("out of memory") == 0


def test_a_group_is_placed_so_that_all_of_it_has_room(stage):
    # shows: without the rule phi4 takes the fast card, on which the larger model then does not fit beside it
    group = f'keep_together = ["{CHAT}", "{OTHER}"]\n[models."{CHAT}"]\ncontext = 4096'
    with stage(group) as it:
        for _ in range(3):
            it.ask(OTHER, num_ctx=4096)
            it.ask(CHAT)
        assert (it.cards(CHAT), it.cards(OTHER)) == ((0,), (1,))
        assert (it.count("load"), it.count("reload"), it.count("evict")) == (2, 0, 0)
    with stage() as it:
        it.ask(OTHER, num_ctx=4096)
        assert it.cards(OTHER) == (0,)


def test_a_more_important_model_keeps_its_card(stage):
    # shows: without the rule the lesser model goes to the fast card, and Ollama unloads the other for it
    def play(it):
        it.ask(OTHER, num_ctx=4096)
        it.ask(LESSER, num_ctx=4096)
        return it.count("evict", OTHER), it.cards(LESSER)

    with stage(f'priority = ["{OTHER}"]') as it:
        assert play(it) == (0, (1,))
    with stage() as it:
        assert play(it) == (1, (0,))


@pytest.mark.parametrize("kept", ["priority", "pinned"])
def test_what_is_to_stay_is_counted_as_gone_where_ollama_unloads_it_all_the_same(stage, kept):
    # shows: it holds most of both cards, so Ollama has no other way; the next one was planned on the rest, with layers in RAM
    with stage(f'priority = ["{CHAT}"]' if kept == "priority" else "") as it:
        it.ask(CHAT, num_ctx=98304)
        if kept == "pinned":
            it.pin(CHAT)
        assert len(it.cards(CHAT)) == 2
        it.ask(LESSER, num_ctx=8192)
        loaded = {model["model"].rpartition("/")[2]: model for model in it.client.get("/lopsided/models").json()["models"]}
        assert it.count("evict", CHAT) == 1
        assert loaded[LESSER]["misplaced"] is None


def test_a_pinned_model_is_not_counted_on_to_go(stage):
    with stage() as it:
        it.pin(OTHER)
        free = it.simulator.rig().gpus[0].free_bytes
        plan = it.client.get("/lopsided/plan", params={"model": CHAT, "num_ctx": 8192}).json()
        assert plan["gpus"][0]["free_bytes"] == free


def test_a_profile_that_watches_nothing_counts_what_is_loaded(stage):
    with stage(source=StaticSource(RIG)) as it:
        it.ask(OTHER, num_ctx=4096)
        gpus = it.client.get("/lopsided/plan", params={"model": SMALL, "num_ctx": 4096}).json()["gpus"]
        real = it.simulator.rig().gpus
        assert abs(gpus[0]["free_bytes"] - real[0].free_bytes) < 2**28
        assert gpus[1]["free_bytes"] == real[1].free_bytes


def test_a_loaded_model_moves_to_the_card_that_became_free_once_and_when_idle(stage, monkeypatch):
    # shows: a game holds the fast card; when it ends the model stays until REPLAN_S is over, then is loaded anew, once
    monkeypatch.setattr(steady, "REPLAN_S", 1.5)
    with stage() as it:
        it.simulator.gpus.occupy(0, 28 * 2**30)
        it.ask(OTHER, num_ctx=4096)
        assert it.cards(OTHER) == (1,)
        it.simulator.gpus.occupy(0, 0)
        it.ask(OTHER, num_ctx=4096)
        assert it.count("reload") == 0
        time.sleep(1.6)
        for _ in range(3):
            it.ask(OTHER, num_ctx=4096)
        assert (it.cards(OTHER), it.count("reload")) == ((0,), 1)


def test_launches_follow_the_rules(tmp_path, monkeypatch):
    file = tmp_path / "lopsided.toml"
    file.write_text(f'[models."phi4*"]\ngpu = "RTX 3090"\n[models."{CHAT}"]\noff = true')
    monkeypatch.setenv("LOPSIDED_CONFIG", str(file))
    with make_machine(tmp_path) as machine:
        assert machine.appended("phi4:14b", context=4096)[:2] == ("--device", "CUDA1")
        assert machine.appended(CHAT, context=32768) == ()
        assert machine.appended("all-minilm:22m", "--embedding", context=256)[:2] == ("--device", "CUDA1")


def test_where_the_launcher_places_the_context_still_goes_out_with_the_request(tmp_path):
    with make_machine(tmp_path, context="fit") as machine:
        machine.launch("qwen2.5:32b", context=32768)
        answer = machine.generate("phi4:14b")
        context = machine.placed()["num_ctx"]
        assert answer.headers[HEADER].endswith(f"; by the launcher; context {context}")
        assert "main_gpu" not in machine.placed()
        machine.generate("llama3.1:8b", num_ctx=2048)
        assert machine.placed()["num_ctx"] == 2048


def test_the_command_line_follows_the_rules_unless_told_not_to(stage, tmp_path):
    with stage(f'[models."{OTHER}"]\ngpu = "RTX 3090"') as it:
        environment = {"LOPSIDED_UPSTREAM": it.url}
        command = ["plan", OTHER, "--gpu", "RTX 5090", "--gpu", "RTX 3090", "--ctx", "4096", "--json"]

        def layers(*more):
            done = CliRunner(env=environment).invoke(main, [*command, *more])
            assert done.exit_code == 0, done.output
            return json.loads(done.stdout)["plan"]["layers"]

        assert layers()[0] == 0
        assert layers("--no-rules")[1] == 0


def test_a_misspelled_variable_and_an_unknown_gpu_are_said_by_the_doctor(stage, tmp_path):
    profile = tmp_path / "gpus.toml"
    profile.write_text('[[gpu]]\nname = "RTX 5090"\n[[gpu]]\nname = "RTX 3090"\n')
    with stage('[models.a]\ngpu = "RTX 4090"') as it:
        environment = {"LOPSIDED_UPSTREAM": it.url, "LOPSIDED_CONTXT": "fit", "LOPSIDED_HOST": "127.0.0.1:1"}
        environment |= {"LOPSIDED_PROFILE": str(profile), "LOPSIDED_BOOST": "2", "LOPSIDED_FOO": "1"}
        said = CliRunner(env=environment).invoke(main, ["doctor", "--json"])
        texts = [finding["text"] for finding in json.loads(said.stdout)["findings"]]
        assert "LOPSIDED_CONTXT is no setting, and has no effect; did you mean 'LOPSIDED_CONTEXT'?" in texts
        assert "LOPSIDED_BOOST is no setting, and has no effect; did you mean 'OLLAMA_SCHED_COMPUTE_BOOST'?" in texts
        assert "LOPSIDED_FOO is no setting, and has no effect" in texts  # all names begin alike: that means nothing
        assert f"{it.file}: a rule names the GPU 'RTX 4090', which is not here: that part of the rule is ignored" in texts
