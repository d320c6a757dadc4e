"""One frozen settings object, from the environment and ``lopsided.toml``; nothing else reads the environment.

An environment variable wins over the file. The file is the one that ``LOPSIDED_CONFIG`` names, else ``lopsided.toml`` in the
working directory; its keys are the field names below (and ``upstream``), and those of the rules (``proxy.config.rules``). Quotes
and blanks around a value are dropped and an empty one counts as not set, as with Ollama. Ollama's own variables are read under
Ollama's names: one environment serves both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from planner.power import BOOST_MAX, BOOST_MIN
from proxy.address import LISTEN_PORT, Address, parse_address
from proxy.config.rules import RULE_KEYS
from proxy.config.tomlfile import closest, line_of, read_toml
from proxy.errors import SettingsError

FILE_NAME = "lopsided.toml"
"""The settings file looked for in the working directory."""

FILE_VARIABLE = "LOPSIDED_CONFIG"
"""The environment variable that names another one."""

PREFIX = "LOPSIDED_"
"""What the names of lopsided's own environment variables begin with."""

OTHER_VARIABLES = (FILE_VARIABLE, "LOPSIDED_URL", "LOPSIDED_LIBRARY", "LOPSIDED_PUBLISH")
"""Variables with this prefix that are no settings: the file's, the launcher's, the container's and compose's."""

CACHE_TYPES = ("f16", "q8_0", "q4_0")
"""What Ollama takes for ``OLLAMA_KV_CACHE_TYPE``."""

OBJECTIVES = ("decode", "prefill", "balanced", "auto")
"""What a plan is to make fast; ``auto``: each model's usual turn."""

GO_BOOLEANS = {
    **dict.fromkeys(("1", "t", "T", "true", "True", "TRUE"), True),
    **dict.fromkeys(("0", "f", "F", "false", "False", "FALSE"), False),
}
"""What Go's ``strconv.ParseBool`` understands. Ollama takes everything else for true, so it is refused here."""


def _listen(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    address = parse_address(value, default_port=LISTEN_PORT, strict=True)
    if address.scheme != "http" or address.path:
        raise ValueError("host:port, without https and without a path")
    _askable(address.connectable())
    return address


def _upstream(value: Any) -> Any:
    return _askable(parse_address(value, strict=True).connectable()) if isinstance(value, str) else value


def _ollama_host(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    address = parse_address(value).connectable()
    if address.scheme not in ("http", "https"):
        raise ValueError("an address with http or https, or without a scheme")
    return _askable(address)


def _askable(address: Address) -> Address:
    """``address`` if requests can be sent to it; Ollama takes any text for a host."""
    try:
        _ = httpx.URL(address.url).host, address.host.encode("idna")  # as the resolver has it
    except (httpx.InvalidURL, ValueError) as error:  # UnicodeError, for a name that IDNA does not know
        raise ValueError("host:port, with http:// or https:// or without, and no user's name") from error
    return address


def _boost(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value.lower() == "auto"):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if isinstance(value, bool) or not BOOST_MIN <= number <= BOOST_MAX:
        raise ValueError(f"auto, or a number from {BOOST_MIN} to {BOOST_MAX}")
    return number


def _switch(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if (text := str(value).lower()) not in ("on", "off"):
        raise ValueError("on or off")
    return text == "on"


def _objective(value: Any) -> Any:
    if (name := str(value).lower()) not in OBJECTIVES:
        raise ValueError("one of " + ", ".join(OBJECTIVES))
    return name


def _go_boolean(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if str(value) not in GO_BOOLEANS:
        raise ValueError("1, true, 0 or false (Ollama takes anything else for true)")
    return GO_BOOLEANS[str(value)]


def _count(value: Any) -> Any:
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdecimal()) or int(text) >= 2**63:
        raise ValueError("a whole number, 0 or larger")
    return int(text) or None  # 0 means "not set" to Ollama in each of these


def _seconds(value: Any) -> Any:
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdecimal()) or int(text) > 86400:
        raise ValueError("whole seconds, from 0 to 86400")
    return int(text)


def _cache_type(value: Any) -> Any:
    if (name := str(value).lower()) not in CACHE_TYPES:
        raise ValueError("one of " + ", ".join(CACHE_TYPES))
    return name


def _context(value: Any) -> Any:
    if (name := str(value).lower()) not in ("keep", "fit"):
        raise ValueError("keep or fit")
    return name


def _words(value: Any) -> Any:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) and item.strip() for item in items):
        raise ValueError("names, separated by commas")
    return tuple(item.strip() for item in items)


def _file(value: Any) -> Any:
    path = _expanded(str(value))
    if not path.is_file():
        raise ValueError("the path of an existing TOML file that describes the GPUs")
    return path


def _path(value: Any) -> Any:
    if not isinstance(value, str | Path):
        raise ValueError("the path of a file with the token in it")
    return _expanded(value)


def _expanded(value: str | Path) -> Path:
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # ~somebody, who has no home here
        raise ValueError(f"a path; {error}") from error


def _folder(value: Any) -> Any:
    if not isinstance(value, str | Path | None) or (isinstance(value, str) and "\0" in value):
        raise ValueError("the path of a folder to keep state in, or off")
    return None if value is None or str(value).lower() == "off" else _expanded(value)


def _state_folder() -> Path | None:
    """Where programs keep state by the XDG base directory specification; ``None`` for a user without a home."""
    base = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not base.is_absolute():  # the specification says to ignore such a value
        try:
            base = Path.home() / ".local" / "state"
        except RuntimeError:
            return None
    return base / "lopsided"


def _text(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("text")
    return value


Switch = Annotated[bool, BeforeValidator(_switch)]
GoBoolean = Annotated[bool, BeforeValidator(_go_boolean)]
Count = Annotated[int | None, BeforeValidator(_count)]
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)]
Upstream = Annotated[Address | None, NoDecode]


class _FileSource(TomlConfigSettingsSource):
    """``lopsided.toml``: field names become the variables' names that the fields are known by."""

    def __call__(self) -> dict[str, Any]:
        return {_variable(key): value for key, value in super().__call__().items() if key not in RULE_KEYS}


class Settings(BaseSettings):
    """Every setting of lopsided; made by :func:`load_settings`."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", case_sensitive=True, validate_default=False)

    host: Annotated[Address, NoDecode, BeforeValidator(_listen)] = Field(
        Address(port=LISTEN_PORT), validation_alias="LOPSIDED_HOST"
    )
    """Where the proxy listens."""
    own_upstream: Annotated[Upstream, BeforeValidator(_upstream)] = Field(None, validation_alias="LOPSIDED_UPSTREAM")
    """The Ollama behind the proxy; ``upstream`` in the file."""
    ollama_host: Annotated[Upstream, BeforeValidator(_ollama_host)] = Field(None, validation_alias="OLLAMA_HOST")
    """The same for those who have set it for Ollama."""
    boost: Annotated[float | None, BeforeValidator(_boost)] = Field(None, validation_alias="OLLAMA_SCHED_COMPUTE_BOOST")
    """The boost algorithm's factor; ``None`` is the automatic search."""
    objective: Annotated[Literal["decode", "prefill", "balanced", "auto"], BeforeValidator(_objective)] = Field(
        "decode", validation_alias="LOPSIDED_OBJECTIVE"
    )
    """What a plan is to make fast, one of ``OBJECTIVES``."""
    calibration: Switch = Field(True, validation_alias="LOPSIDED_CALIBRATION")
    """Learn from answers how fast each GPU is; off: plans by the cards' data alone."""
    tensor_split: Switch = Field(True, validation_alias="LOPSIDED_TENSOR_SPLIT")
    """Inject ``tensor_split`` for plans over several GPUs: forks of Ollama obey it, stock logs it as invalid."""
    v1: Switch = Field(True, validation_alias="LOPSIDED_V1")
    """Give requests to ``/v1``, which carry no options, their placement by derived models in Ollama's store."""
    context: Annotated[Literal["keep", "fit"], BeforeValidator(_context)] = Field("keep", validation_alias="LOPSIDED_CONTEXT")
    """What happens to a context that nobody sets; ``fit``: the most that the best placement has room for."""
    device_order: Words = Field((), validation_alias="LOPSIDED_DEVICE_ORDER")
    """UUIDs or names of the GPUs in Ollama's order."""
    token: Annotated[str | None, BeforeValidator(_text)] = Field(None, validation_alias="LOPSIDED_TOKEN", repr=False)
    """Opens lopsided's own endpoints to other machines."""
    token_file: Annotated[Path | None, BeforeValidator(_path)] = Field(None, validation_alias="LOPSIDED_TOKEN_FILE")
    """Where the token stands, if ``token`` is not set: in a container, what docker/entrypoint of Ollama's wrote."""
    require_token: Switch = Field(False, validation_alias="LOPSIDED_REQUIRE_TOKEN")
    """Every request needs the token, those for Ollama too."""
    drain_s: Annotated[int, BeforeValidator(_seconds)] = Field(30, validation_alias="LOPSIDED_DRAIN")
    """After SIGTERM, how many seconds answers that are under way may take to end."""
    state: Annotated[Path | None, BeforeValidator(_folder)] = Field(
        default_factory=_state_folder, validation_alias="LOPSIDED_STATE"
    )
    """The folder of what outlives the proxy (placements in force, …); ``None`` keeps nothing."""
    profile: Annotated[Path | None, BeforeValidator(_file)] = Field(None, validation_alias="LOPSIDED_PROFILE")
    """A TOML file that describes the GPUs, in place of NVML."""
    num_parallel: Count = Field(None, validation_alias="OLLAMA_NUM_PARALLEL")
    """Sequences per model; Ollama's default is 1."""
    kv_cache_type: Annotated[str, BeforeValidator(_cache_type)] = Field("f16", validation_alias="OLLAMA_KV_CACHE_TYPE")
    """Type of the KV cache, one of ``CACHE_TYPES``."""
    flash_attention: GoBoolean | None = Field(None, validation_alias="OLLAMA_FLASH_ATTENTION")
    """``None``: Ollama decides by GPU and model."""
    context_length: Count = Field(None, validation_alias="OLLAMA_CONTEXT_LENGTH")
    """Context in tokens where neither request nor model sets one; ``None``: by total VRAM."""
    sched_spread: GoBoolean = Field(False, validation_alias="OLLAMA_SCHED_SPREAD")
    """Ollama spreads every model over all GPUs."""
    gpu_overhead_bytes: Count = Field(None, validation_alias="OLLAMA_GPU_OVERHEAD")
    """Bytes that Ollama leaves free on each GPU."""
    origins: Words = Field((), validation_alias="OLLAMA_ORIGINS")
    """Origins allowed beside the local ones; ``*`` stands for anything."""

    @property
    def upstream(self) -> Address:
        """The Ollama behind the proxy: ``LOPSIDED_UPSTREAM``, else ``OLLAMA_HOST``, else 127.0.0.1:11434."""
        return self.own_upstream or self.ollama_host or Address()

    @property
    def bearer(self) -> str | None:
        """The token in force: ``token``, else what ``token_file`` holds by now; ``None`` where there is none."""
        if self.token is not None or self.token_file is None:
            return self.token
        try:
            return self.token_file.read_text(encoding="utf-8").strip() or None
        except (OSError, ValueError):  # no UTF-8, or a path that no file can have
            return None

    @model_validator(mode="before")
    @classmethod
    def _trim(cls, values: dict[str, Any]) -> dict[str, Any]:
        trimmed = {key: value.strip().strip("\"'").strip() if isinstance(value, str) else value for key, value in values.items()}
        return {key: value for key, value in trimmed.items() if value != ""}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic-settings passes it by name
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keywords, then the environment, then the file."""
        return init_settings, env_settings, _FileSource(settings_cls, toml_file=settings_file())


def load_settings(**overrides: Any) -> Settings:
    """The settings in force; ``overrides`` (field names, such as ``host="0.0.0.0:80"``) win over everything.

    Raises ``SettingsError`` for the first value that is not allowed: the variable or the file's key, the value, what is allowed.
    The rules in the file are :class:`proxy.config.rulefile.RuleFile`'s.
    """
    file = settings_file()
    if os.environ.get(FILE_VARIABLE) and not file.is_file():
        raise SettingsError(f"{FILE_VARIABLE}={str(file)!r} is not a file")
    try:
        settings = Settings(**{_variable(name): value for name, value in overrides.items()})
    except ValidationError as error:
        raise SettingsError(_explain(error, overrides, file)) from None
    except (ValueError, OSError, RecursionError) as error:  # tomllib.TOMLDecodeError says line and column
        raise SettingsError(f"{file}: {error}") from None
    if settings.require_token and settings.token is None and settings.token_file is None:
        raise SettingsError("LOPSIDED_REQUIRE_TOKEN is on, and there is no token: set LOPSIDED_TOKEN or LOPSIDED_TOKEN_FILE")
    if settings.upstream == settings.host.connectable():
        raise SettingsError(
            f"the proxy would listen on {settings.host.authority}, which is also the Ollama that it should ask: "
            "set LOPSIDED_UPSTREAM to Ollama's own address (OLLAMA_HOST may name the proxy, for clients)"
        )
    return settings


def unknown_variables(environment: Mapping[str, str]) -> tuple[str, ...]:
    """A line for each variable that is named like a setting and is none: one that was misspelled has no effect."""
    known = [str(field.validation_alias) for field in Settings.model_fields.values()] + [*OTHER_VARIABLES]
    strangers = sorted(name for name in environment if name.upper().startswith(PREFIX) and name not in known)

    def meant(name: str) -> str:
        alias = _variable(key := name[len(PREFIX) :].lower())  # LOPSIDED_BOOST: the file's name for one of Ollama's
        return closest(key, known, prefix=PREFIX) if alias == key else f"; did you mean {alias!r}?"

    return tuple(f"{name} is no setting, and has no effect{meant(name)}" for name in strangers)


def setting_names() -> frozenset[str]:
    """The keys of ``lopsided.toml`` that are settings."""
    return frozenset({"upstream", *Settings.model_fields} - {"own_upstream"})


def settings_file() -> Path:
    """The file of settings and rules; it need not exist."""
    return Path(os.environ.get(FILE_VARIABLE) or FILE_NAME)


def _variable(key: str) -> str:
    """The environment variable that the file's ``key`` (or a field's name) stands for; an unknown key as it is."""
    field = Settings.model_fields.get("own_upstream" if key == "upstream" else key)
    return str(field.validation_alias) if field is not None else key


def _explain(error: ValidationError, overrides: dict[str, Any], file: Path) -> str:
    problem = error.errors()[0]
    variable = str(problem["loc"][0])
    names = [name for name in ("upstream", *Settings.model_fields) if _variable(name) == variable]
    if problem["type"] == "extra_forbidden":
        allowed = sorted({*setting_names(), *RULE_KEYS})
        hint = closest(variable, allowed) or f"; there are {', '.join(allowed)}"
        return f"{file}:{_line(file, variable)}: there is no setting {variable!r}{hint}"
    allowed_values = problem["msg"].removeprefix("Value error, ")
    value = "" if variable == "LOPSIDED_TOKEN" else f" = {problem['input']!r}"
    if any(name in overrides for name in names):
        where = names[0]
    elif os.environ.get(variable):
        where = variable
    else:
        where = f"{file}:{_line(file, *names)}: {names[0]}"
    return f"{where}{value} is not allowed; allowed: {allowed_values}"


def _line(file: Path, *keys: str) -> int:
    """The line of the file at which the first of ``keys`` that it has begins."""
    content, text = read_toml(file)
    return next((line_of(text, (key,)) for key in keys if key in content), 1)
