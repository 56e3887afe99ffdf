"""Settings from flags and XLORA_* variables."""

from __future__ import annotations

import pytest

from service.cli import build_parser, given_settings
from service.contract.errors import SettingsError
from service.settings import Settings, load_settings, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 << 20), ("2 GiB", 2 << 30), ("1.5GB", 1_500_000_000), ("4096", 4096), ("1kib", 1024)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "12 parsecs", "-1MiB", "1e3"])
def test_bad_sizes_name_the_units(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--kv-memory.*MiB"):
        load_settings({"kv_memory": text})


def test_a_flag_wins_over_its_variable_and_none_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLORA_PORT", "9001")
    monkeypatch.setenv("XLORA_LOOKAHEAD", "false")
    assert load_settings({"port": None}).port == 9001
    assert load_settings({"port": "9002"}).port == 9002
    monkeypatch.setenv("XLORA_PREFIX_CACHE", "0")
    assert load_settings({}).lookahead is False
    assert load_settings({}).prefix_cache is False
    assert load_settings({"speculative_tokens": "0"}).speculative_tokens == 0


def test_an_unknown_variable_is_an_error_with_a_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLORA_MAX_NUM_SEQ", "3")
    with pytest.raises(SettingsError, match="XLORA_MAX_NUM_SEQ") as caught:
        load_settings()
    assert caught.value.hint == "did you mean XLORA_MAX_NUM_SEQS?"


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("compile", "native kernels compute whole decoder layers without it; leave it out"),
        ("compile_cache", "use --native-cache or XLORA_NATIVE_CACHE"),
    ],
)
@pytest.mark.parametrize("value", ["true", "0", ""])
def test_what_was_removed_says_what_to_do(monkeypatch: pytest.MonkeyPatch, name: str, instead: str, value: str) -> None:
    """Whatever it is set to, in a line; a flag that is not given is no wish."""
    assert load_settings({name: None}) == load_settings()
    flag, variable = f"--{name.replace('_', '-')}", f"XLORA_{name.upper()}"
    with pytest.raises(SettingsError, match=f"^{flag} was removed: {instead}$"):
        load_settings({name: value})
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=f"^{variable} was removed: {instead}$"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "70000"),
        ("device", "tpu"),
        ("dtype", "int8"),
        ("max_num_seqs", "0"),
        ("threads", "two"),
        ("speculative_tokens", "-1"),
    ],
)
def test_a_bad_value_names_its_source(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"--{name.replace('_', '-')}"):
        load_settings({name: value})
    monkeypatch.setenv(f"XLORA_{name.upper()}", value)
    with pytest.raises(SettingsError, match=f"XLORA_{name.upper()}"):
        load_settings()


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("https://a.example/", ["https://a.example"]),
        ("HTTPS://A.Example:443, http://b:80/", ["https://a.example", "http://b"]),
        ("http://localhost:3000,https://[::1]:8443,", ["http://localhost:3000", "https://[::1]:8443"]),
        ("https://a.example:80", ["https://a.example:80"]),
        ("*", ["*"]),
        ("null, chrome-extension://abc", ["null", "chrome-extension://abc"]),
        ("", []),
    ],
)
def test_origins_are_what_browsers_send(monkeypatch: pytest.MonkeyPatch, text: str, origins: list[str]) -> None:
    assert load_settings({"cors_origins": [text]}).cors_origins == origins
    monkeypatch.setenv("XLORA_CORS_ORIGINS", text)
    assert load_settings().cors_origins == origins


@pytest.mark.parametrize(
    "text",
    [
        *("*.example", "https://*.example", "a.example", "localhost:3000", "https://a.example/app", "https://u@a"),
        *("https://a.example?x", "https://a.example:99999", "https://a.example:", "https://", "https://ä.example"),
        *("https://a.example; https://b.example", "https://a.example https://b.example", "//a.example", "/"),
    ],
)
def test_what_no_browser_sends_is_refused_at_start(text: str) -> None:
    """It would match nothing, and nobody would know why."""
    with pytest.raises(SettingsError, match=r"--cors-origins.*is not an origin"):
        load_settings({"cors_origins": [f"https://fine.example,{text}"]})


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_served_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several after one flag, or in a variable; no two that NAME/base and NAME/EXPERT could confuse."""
    arguments = build_parser().parse_args(["serve", "--served-model-name", "a", "org/b", "--port", "1"])
    assert load_settings(given_settings(arguments)).served_model_name == ["a", "org/b"]
    monkeypatch.setenv("XLORA_SERVED_MODEL_NAME", "a,org/b")
    assert load_settings().served_model_name == ["a", "org/b"]
    for names in (["a", "a"], ["a", "a/math"], [""]):
        with pytest.raises(SettingsError, match="--served-model-name"):
            load_settings({"served_model_name": names})
