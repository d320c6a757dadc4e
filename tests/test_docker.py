"""The container files: what a reader of them relies on, checked without a Docker daemon."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.servers import free_port, serve

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


def interpolate(text: str, environment: dict[str, str]) -> str:
    """Compose's ``${NAME:-default}``."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: environment.get(m[1]) or m[2], text)


def compose(**environment: str) -> dict:
    return yaml.safe_load(interpolate((ROOT / "docker" / "compose.yaml").read_text(), environment))


@pytest.fixture
def services() -> dict:
    return compose()["services"]


def test_the_clients_port_is_lopsideds_and_only_on_loopback(services):
    assert services["lopsided"]["ports"] == ["127.0.0.1:11434:11435"]
    assert compose(LOPSIDED_PUBLISH="0.0.0.0:11434")["services"]["lopsided"]["ports"] == ["0.0.0.0:11434:11435"]


def test_ollama_is_reached_through_the_proxy_alone(services):
    assert "ports" not in services["ollama"]
    assert services["ollama"]["expose"] == ["11434"]
    assert services["lopsided"]["environment"]["LOPSIDED_UPSTREAM"] == "http://ollama:11434"
    assert services["lopsided"]["environment"]["LOPSIDED_HOST"] == "0.0.0.0:11435"


def test_both_services_read_ollamas_settings_from_one_place(services):
    shared = compose()["x-ollama-environment"]
    assert shared["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert {"OLLAMA_NUM_PARALLEL", "OLLAMA_CONTEXT_LENGTH", "OLLAMA_KV_CACHE_TYPE", "OLLAMA_FLASH_ATTENTION"} <= shared.keys()
    assert {"OLLAMA_SCHED_SPREAD", "OLLAMA_GPU_OVERHEAD", "OLLAMA_MODELS"} <= shared.keys()
    for service in services.values():
        assert shared.items() <= service["environment"].items()
    changed = compose(OLLAMA_NUM_PARALLEL="3")["services"]
    assert {service["environment"]["OLLAMA_NUM_PARALLEL"] for service in changed.values()} == {3}


def test_lopsided_sees_the_gpus_through_nvml_and_ollama_computes_on_them(services):
    devices = {name: service["deploy"]["resources"]["reservations"]["devices"] for name, service in services.items()}
    assert devices["ollama"] == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    assert devices["lopsided"] == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu", "utility"]}]
    assert "NVIDIA_DRIVER_CAPABILITIES=utility" in DOCKERFILE


def test_the_models_are_shared_read_only_under_one_path(services):
    path = services["ollama"]["environment"]["OLLAMA_MODELS"]
    assert f"models:{path}" in services["ollama"]["volumes"]
    assert f"models:{path}:ro" in services["lopsided"]["volumes"]
    assert "models" in compose()["volumes"]


def test_ollama_starts_by_the_entrypoint_with_the_launcher_beside_it(services):
    ollama = services["ollama"]
    mounts = {parts[1]: parts[0] for parts in (volume.split(":") for volume in ollama["volumes"])}
    assert ollama["entrypoint"] == ["sh", "/opt/lopsided/entrypoint"]
    assert ollama["command"] == ["serve"]
    for name in ("entrypoint", "llama-server"):
        assert (ROOT / "docker" / mounts[f"/opt/lopsided/{name}"]).is_file()
    assert ollama["environment"]["OLLAMA_SCHED_SPREAD"] == 1
    assert ollama["environment"]["LOPSIDED_URL"] == f"http://lopsided:{services['lopsided']['ports'][0].rpartition(':')[2]}"


def test_both_containers_have_one_token_in_one_file_that_ollamas_makes(services):
    file = Path(services["ollama"]["environment"]["LOPSIDED_TOKEN_FILE"])
    assert services["lopsided"]["environment"]["LOPSIDED_TOKEN_FILE"] == str(file)
    assert f"token:{file.parent}" in services["ollama"]["volumes"]
    assert f"token:{file.parent}:ro" in services["lopsided"]["volumes"]
    assert "token" in compose()["volumes"]
    given = compose(LOPSIDED_TOKEN="mine")["services"]
    assert {service["environment"]["LOPSIDED_TOKEN"] for service in given.values()} == {"mine"}


def test_lopsided_waits_for_a_healthy_ollama_and_runs_with_few_rights(services):
    assert services["lopsided"]["depends_on"] == {"ollama": {"condition": "service_healthy"}}
    assert services["ollama"]["healthcheck"]["test"][0] == "CMD"
    assert services["lopsided"]["read_only"] is True
    assert services["lopsided"]["cap_drop"] == ["ALL"]
    assert services["lopsided"]["security_opt"] == ["no-new-privileges:true"]


def test_state_outlives_the_container_in_a_volume_that_the_user_of_the_image_owns(services):
    folder = re.search(r"LOPSIDED_STATE=(\S+)", DOCKERFILE)[1]
    assert f"state:{folder}" in services["lopsided"]["volumes"]
    assert "state" in compose()["volumes"]
    user, group = re.search(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE).groups()
    assert re.search(rf"install --directory --owner={user} --group={group} .*{re.escape(folder)}$", DOCKERFILE, re.MULTILINE)


def test_compose_builds_the_image_from_the_repositorys_root(services):
    build = services["lopsided"]["build"]
    context = (ROOT / "docker" / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]).is_file()


def test_the_image_copies_only_what_exists_and_what_the_ignore_file_lets_through():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [source for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE) for source in line.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in allowed, source


def test_the_last_stage_is_slim_and_not_root():
    last = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert re.search(r"^FROM python:\$\{PYTHON_VERSION\}-slim$", last, re.MULTILINE)
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", last, re.MULTILINE)
    assert json.loads(re.search(r"^ENTRYPOINT (.*)$", last, re.MULTILINE)[1]) == ["lopsided"]
    assert json.loads(re.search(r"^CMD (.*)$", last, re.MULTILINE)[1]) == ["serve"]


def health_check(port: int) -> int:
    command = json.loads(re.search(r"^HEALTHCHECK .*? CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)[1])
    command[0] = sys.executable
    environment = {**os.environ, "LOPSIDED_HOST": f"0.0.0.0:{port}", "HTTP_PROXY": "http://127.0.0.1:9"}
    return subprocess.run(command, env=environment, timeout=10, stderr=subprocess.DEVNULL).returncode


def answer(status: int):
    async def app(scope, receive, send):
        assert scope["path"] == "/lopsided/health"
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})

    return app


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_images_health_check_follows_the_servers_answer(status, healthy):
    with serve(answer(status), lifespan="off") as url:
        assert (health_check(int(url.rpartition(":")[2])) == 0) is healthy


def test_the_images_health_check_fails_where_nobody_listens():
    assert health_check(free_port()) != 0
