"""Settings: where values come from, how Ollama's variables are understood, and what is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from proxy.address import Address, parse_address
from proxy.config.settings import Settings, load_settings
from proxy.errors import SettingsError
from proxy.gpus.static import StaticSource


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in os.environ:
        if name.startswith(("LOPSIDED_", "OLLAMA_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_defaults():
    settings = load_settings()
    assert settings.host.url == "http://127.0.0.1:11435"
    assert settings.upstream.url == "http://127.0.0.1:11434"
    assert (settings.boost, settings.tensor_split, settings.kv_cache_type, settings.sched_spread) == (None, True, "f16", False)


@pytest.mark.parametrize(  # the table of TestHost in envconfig/config_test.go, v0.32
    ("value", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("1.2.3.4", "http://1.2.3.4:11434"),
        (":1234", "http://:1234"),
        ("1.2.3.4:1234", "http://1.2.3.4:1234"),
        ("example.com", "http://example.com:11434"),
        ("example.com:1234", "http://example.com:1234"),
        (":0", "http://:0"),
        (":66000", "http://:11434"),
        (":-1", "http://:11434"),
        ("[::1]", "http://[::1]:11434"),
        ("[::]", "http://[::]:11434"),
        ("::1", "http://[::1]:11434"),
        ("[::1]:1337", "http://[::1]:1337"),
        (" 1.2.3.4 ", "http://1.2.3.4:11434"),
        ('"1.2.3.4"', "http://1.2.3.4:11434"),
        (' " 1.2.3.4 " ', "http://1.2.3.4:11434"),
        ("'1.2.3.4'", "http://1.2.3.4:11434"),
        ("http://1.2.3.4", "http://1.2.3.4:80"),
        ("http://1.2.3.4:4321", "http://1.2.3.4:4321"),
        ("https://1.2.3.4", "https://1.2.3.4:443"),
        ("https://1.2.3.4:4321", "https://1.2.3.4:4321"),
        ("https://example.com/ollama", "https://example.com:443/ollama"),
        ("ollama.com", "https://ollama.com:443"),
    ],
)
def test_ollama_host_is_read_as_ollama_reads_it(value, url):
    assert parse_address(value).url == url


@pytest.mark.parametrize(
    ("value", "url"),
    [("0.0.0.0", "http://127.0.0.1:11434"), ("[::]:80", "http://[::1]:80"), (":1234", "http://127.0.0.1:1234")],
)
def test_an_address_to_listen_on_is_reached_by_loopback(monkeypatch, value, url):
    monkeypatch.setenv("OLLAMA_HOST", value)
    assert load_settings().upstream.url == url


def test_own_upstream_wins_over_ollama_host(monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:11435")  # clients are pointed at the proxy
    monkeypatch.setenv("LOPSIDED_UPSTREAM", "gpu-box")
    assert load_settings().upstream == Address(host="gpu-box")


@pytest.mark.parametrize("value", ["127.0.0.1:11435", "0.0.0.0:11435"])
def test_a_proxy_that_would_ask_itself_is_refused(monkeypatch, value):
    monkeypatch.setenv("OLLAMA_HOST", value)
    with pytest.raises(SettingsError, match="LOPSIDED_UPSTREAM"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("OLLAMA_SCHED_COMPUTE_BOOST", "2.1", "auto, or a number from 1.0 to 2.0"),
        ("OLLAMA_SCHED_COMPUTE_BOOST", "0.99", "1.0 to 2.0"),
        ("OLLAMA_SCHED_COMPUTE_BOOST", "fast", "1.0 to 2.0"),
        ("OLLAMA_SCHED_COMPUTE_BOOST", "nan", "1.0 to 2.0"),
        ("LOPSIDED_HOST", "127.0.0.1:99999", "a port from 0 to 65535"),
        ("LOPSIDED_HOST", "https://127.0.0.1:1", "without https"),
        ("LOPSIDED_HOST", "xn--zzzzzz--:1", "host:port"),
        ("LOPSIDED_HOST", "a" * 64 + ":1", "host:port"),
        ("LOPSIDED_UPSTREAM", "a" * 64 + ":1", "host:port"),
        ("LOPSIDED_STATE", "~nobody-of-that-name/x", "a path"),
        ("LOPSIDED_PROFILE", "~nobody-of-that-name/x", "a path"),
        ("LOPSIDED_TOKEN_FILE", "~nobody-of-that-name/x", "a path"),
        ("LOPSIDED_UPSTREAM", "ftp://x", "http:// or https://"),
        ("LOPSIDED_UPSTREAM", "x:port", "a port from 0 to 65535"),
        ("OLLAMA_HOST", "unix://x", "http or https"),
        ("OLLAMA_HOST", "a:b:c", "host:port"),
        ("OLLAMA_HOST", "127.0.0.1:1/a\nb", "host:port"),
        ("OLLAMA_HOST", "http://me:secret@gpu-box:1", "no user's name"),
        ("LOPSIDED_UPSTREAM", "xn--zzzzzz--:1", "host:port"),
        ("LOPSIDED_TENSOR_SPLIT", "yes", "on or off"),
        ("LOPSIDED_DEVICE_ORDER", "a,,b", "separated by commas"),
        ("LOPSIDED_PROFILE", "missing.toml", "TOML file"),
        ("OLLAMA_NUM_PARALLEL", "-1", "whole number"),
        ("OLLAMA_CONTEXT_LENGTH", "8k", "whole number"),
        ("OLLAMA_CONTEXT_LENGTH", "99999999999999999999", "whole number"),
        ("OLLAMA_GPU_OVERHEAD", "1GiB", "whole number"),
        ("OLLAMA_KV_CACHE_TYPE", "q9_0", "f16, q8_0, q4_0"),
        ("OLLAMA_SCHED_SPREAD", "yes", "1, true, 0 or false"),
        ("OLLAMA_FLASH_ATTENTION", "maybe", "1, true, 0 or false"),
    ],
)
def test_a_wrong_value_is_refused_by_name(monkeypatch, name, value, allowed):
    # shows: the message names the variable, the value and what is allowed
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as refused:
        load_settings()
    assert f"{name} = {value!r}" in str(refused.value)
    assert allowed in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "field", "understood"),
    [
        ("OLLAMA_SCHED_COMPUTE_BOOST", "1.75", "boost", 1.75),
        ("OLLAMA_SCHED_COMPUTE_BOOST", "AUTO", "boost", None),
        ("OLLAMA_SCHED_COMPUTE_BOOST", " '2' ", "boost", 2.0),
        ("LOPSIDED_TENSOR_SPLIT", "OFF", "tensor_split", False),
        ("LOPSIDED_DEVICE_ORDER", "GPU-a, RTX 3090", "device_order", ("GPU-a", "RTX 3090")),
        ("LOPSIDED_TOKEN", "secret", "token", "secret"),
        ("OLLAMA_NUM_PARALLEL", "4", "num_parallel", 4),
        ("OLLAMA_NUM_PARALLEL", "0", "num_parallel", None),
        ("OLLAMA_CONTEXT_LENGTH", "8192", "context_length", 8192),
        ("OLLAMA_GPU_OVERHEAD", "1073741824", "gpu_overhead_bytes", 2**30),
        ("OLLAMA_KV_CACHE_TYPE", "Q8_0", "kv_cache_type", "q8_0"),
        ("OLLAMA_SCHED_SPREAD", "T", "sched_spread", True),
        ("OLLAMA_FLASH_ATTENTION", "0", "flash_attention", False),
        ("OLLAMA_ORIGINS", "http://a,chrome-extension://*", "origins", ("http://a", "chrome-extension://*")),
        ("OLLAMA_NUM_PARALLEL", "", "num_parallel", None),
        ("OLLAMA_KV_CACHE_TYPE", '""', "kv_cache_type", "f16"),
    ],
)
def test_values_are_understood(monkeypatch, name, value, field, understood):
    monkeypatch.setenv(name, value)
    assert getattr(load_settings(), field) == understood


def test_the_file_is_read_and_the_environment_wins(monkeypatch, tmp_path):
    (tmp_path / "lopsided.toml").write_text('boost = 1.5\nupstream = "one"\nsched_spread = true\ndevice_order = ["a", "b"]\n')
    monkeypatch.setenv("LOPSIDED_UPSTREAM", "two")
    settings = load_settings()
    assert (settings.boost, settings.upstream.host, settings.sched_spread) == (1.5, "two", True)
    assert settings.device_order == ("a", "b")


def test_the_examples_of_the_page_are_valid(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "settings.md").read_text()
    settings, profile = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "lopsided.toml").write_text(settings)
    assert load_settings().boost == 1.75
    (tmp_path / "gpus.toml").write_text(profile)
    assert [gpu.name for gpu in StaticSource.from_file(tmp_path / "gpus.toml").rig().gpus][1] == "A card of my own"


def test_a_token_file_that_no_file_can_be_has_no_token(tmp_path):
    (tmp_path / "lopsided.toml").write_text('token_file = "a\\u0000b"\n')
    assert load_settings().bearer is None


def test_another_file_can_be_named(monkeypatch, tmp_path):
    (tmp_path / "mine.toml").write_text("boost = 1.25\n")
    monkeypatch.setenv("LOPSIDED_CONFIG", str(tmp_path / "mine.toml"))
    assert load_settings().boost == 1.25
    monkeypatch.setenv("LOPSIDED_CONFIG", "gone.toml")
    with pytest.raises(SettingsError, match=r"LOPSIDED_CONFIG='gone.toml'"):
        load_settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("boost = 3", r"lopsided\.toml:1: boost = 3 is not allowed; allowed: auto"),
        ("bosst = 1", r"lopsided\.toml:1: there is no setting 'bosst'; did you mean 'boost'"),
        ("boost = = 1", r"lopsided\.toml: .*line 1"),
        ('upstream = "x:y"', r"lopsided\.toml:1: upstream = 'x:y' is not allowed"),
        ("token = 5", r"lopsided\.toml:1: token is not allowed"),
        ("a = " + "[" * 3000 + "]" * 3000, r"lopsided\.toml: maximum recursion depth"),
    ],
)
def test_a_wrong_file_is_refused_by_file_and_key(tmp_path, text, message):
    (tmp_path / "lopsided.toml").write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_settings()


def test_arguments_win_and_are_named(monkeypatch):
    monkeypatch.setenv("LOPSIDED_HOST", "127.0.0.1:1")
    assert load_settings(host="127.0.0.1:2").host.port == 2
    with pytest.raises(SettingsError, match="host = 'x:y' is not allowed"):
        load_settings(host="x:y")


def test_settings_do_not_change_and_hide_the_token():
    settings = load_settings(token="secret")
    with pytest.raises(ValidationError):
        settings.boost = 1.0
    assert "secret" not in repr(settings)


def test_variables_that_mean_something_else_are_not_read(monkeypatch):
    # shows: fields are known by their variables alone
    monkeypatch.setenv("host", "1.2.3.4:5")
    monkeypatch.setenv("profile", "missing")
    assert load_settings() == Settings()


def test_the_token_may_stand_in_a_file_that_comes_later(monkeypatch, tmp_path):
    file = tmp_path / "token"
    monkeypatch.setenv("LOPSIDED_TOKEN_FILE", str(file))
    settings = load_settings()
    assert settings.bearer is None
    file.write_text("from the file\n")
    assert settings.bearer == "from the file"
    monkeypatch.setenv("LOPSIDED_TOKEN", "own")
    assert load_settings().bearer == "own"


def test_state_is_kept_where_programs_keep_it_unless_another_folder_or_none_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert load_settings().state == tmp_path / "lopsided"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/me")
    assert load_settings().state == Path("/home/me/.local/state/lopsided")
    monkeypatch.setenv("LOPSIDED_STATE", "/var/lib/lopsided")
    assert load_settings().state == Path("/var/lib/lopsided")
    monkeypatch.setenv("LOPSIDED_STATE", "OFF")
    assert load_settings().state is None


def test_a_user_without_a_home_keeps_no_state(monkeypatch):
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert load_settings().state is None
