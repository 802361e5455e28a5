from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.tracking.redact import HIDDEN, is_secret_key, known_secrets, redact

CANARY = "c4n4ry-5ecre7-value"


@pytest.mark.parametrize(
    "value",
    [
        {"WANDB_API_KEY": CANARY},
        {"hub": {"token": CANARY}},
        {"hf_token": CANARY},
        {"dbPassword": CANARY},
        {"aws": {"AWS_SECRET_ACCESS_KEY": CANARY}},
        {"AWS_ACCESS_KEY_ID": CANARY},
        {"credentials": {"user": CANARY, "list": [CANARY, {"x": CANARY}]}},
        [("nested", {"client_secret": CANARY})],
        f"https://user:{CANARY}@host/path",
        f"s3://{CANARY}@bucket/x",
        f"--token={CANARY} --steps 5",
        f"HF_TOKEN={CANARY}",
        f"password: '{CANARY}'",
        f"hub:\n  token: {CANARY}\n",
        json.dumps({"api_key": CANARY}),
        f"https://host/x?a=1&access_token={CANARY}&b=2",
        f"Authorization: Bearer {CANARY}",
        f"curl -H 'Authorization: Basic {CANARY}'",
        {"path": f"/data/{CANARY}/x"},  # known from the environment
        {f"{CANARY}": 1},
        CANARY.encode(),
    ],
)
def test_canaries_are_gone(value: object) -> None:
    assert CANARY not in json.dumps(redact(value, [CANARY]))
    if "/data/" not in str(value) and value not in ({CANARY: 1}, CANARY.encode()):
        assert CANARY not in json.dumps(redact(value))  # by key or form alone, without knowing the value


@pytest.mark.parametrize(
    "token", ["hf_" + "a" * 34, "ghp_" + "A1" * 18, "sk-" + "b" * 40, "AKIA" + "ABCD" * 4, "glpat-" + "x" * 20]
)
def test_tokens_are_known_by_their_shape(token: str) -> None:
    assert redact(f"login with {token}, please") == f"login with {HIDDEN}, please"


@pytest.mark.parametrize(
    "value",
    [
        {"pad_token": "<|pad|>", "eos_token": "</s>", "micro_tokens": 4096, "tokenizer": "x", "tokens": 12},
        {"key": "sentence", "run_id": "20260101-1", "keys": ["a"], "max_tokens": 5, "tokens_per_second": 3.5},
        {"use_auth_token": True, "token": None, "password": 0},
        "https://host:8080/path?page=2",
        "stages: [{name: triage}]\nmicro_tokens: 4096\npad_token: <pad>\ntoken: null\n",
        "the token count is 5: fine",
    ],
)
def test_ordinary_values_stay(value: object) -> None:
    assert redact(value) == value


def test_known_secrets_come_from_secret_names_only() -> None:
    environ = {"HF_TOKEN": "abcdefgh", "PATH": "/usr/bin:/bin", "SHORT_TOKEN": "abc", "WANDB_API_KEY": "12345678"}
    assert sorted(known_secrets(environ)) == ["12345678", "abcdefgh"]
    assert is_secret_key("wandb-api-key") and not is_secret_key("last_token") and not is_secret_key("__")


@settings(max_examples=40)
@given(st.recursive(st.none() | st.integers() | st.text("ab c:/=", max_size=12), lambda inner: st.lists(inner)))
def test_redacting_twice_changes_nothing_more(value: object) -> None:
    once = redact(value, ["ab a"])
    assert redact(once, ["ab a"]) == once
