"""Take secrets out of anything that is about to be written to a file, a log or a tracking service."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

HIDDEN = "[redacted]"

# Words that make the last part of a key a secret whatever stands before them.
_SECRET_WORDS = {
    "password", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials", "apikey",
    "authorization", "bearer", "cookie",
}  # fmt: skip
_SECRET_ENDINGS = ("password", "passwd", "passphrase", "secret", "apikey")  # PGPASSWORD, without a mark between
# "key" and "id" are secret only in company: api_key, AWS_ACCESS_KEY_ID; not key, run_id.
_KEY_COMPANY = {"api", "access", "secret", "private", "encryption", "signing", "account"}
# The tokenizer's own tokens are not secrets.
_PLAIN_TOKENS = {
    "pad",
    "eos",
    "bos",
    "unk",
    "mask",
    "sep",
    "cls",
    "special",
    "stop",
    "start",
    "end",
    "image",
    "per",
    "last",
}

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_URL_USER = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^\s/@'\"]+)@")
# One line's "key = " or "key: ", and what may stand behind it.
_KEY = re.compile(r"(?P<key>(?<![A-Za-z0-9_])[\"']?[A-Za-z][A-Za-z0-9_-]*[\"']?)[ \t]*[=:][ \t]*")
_VALUE = re.compile(
    r"\"(?:[^\"\\]|\\.)*\"|'[^']*'|(?:Bearer|Basic)\s+[^\s,;&\"']+|\[redacted\]|[^\s,;&\"'{}\[\]]+",
)
_AUTHORIZATION = re.compile(r"\b(?P<kind>Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}")
# Published shapes of tokens: Hugging Face, GitHub, GitLab, OpenAI-like, AWS key ids, Slack, W&B.
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|sk-[A-Za-z0-9_-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|xox[abprs]-[A-Za-z0-9-]{10,}|wandb_v\d_[A-Za-z0-9_]{16,})\b"
)
_RANDOM = re.compile(r"[A-Za-z0-9]{16}")  # not the words of a name such as sk-learn-reviews-2024


def is_secret_key(key: str) -> bool:
    """True for keys such as ``WANDB_API_KEY``, ``hf_token``, ``dbPassword``; false for ``pad_token``, ``tokens``."""
    words = [word.lower() for word in _WORDS.findall(key)]
    if not words:
        return False
    if words[-1] == "id" and len(words) > 1:
        words = words[:-1] if words[-2] == "key" else words
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last in _SECRET_WORDS or last.endswith(_SECRET_ENDINGS):
        return True
    if last == "key":
        return before in _KEY_COMPANY
    return last == "token" and before not in _PLAIN_TOKENS


def known_secrets(environ: Mapping[str, str]) -> list[str]:
    """What must not be seen of an environment: values of variables whose names are secret keys, of at least 8
    characters, and passwords of URLs (a proxy's, a data base's).

    PWD and OLDPWD are the shell's working directories, not passwords: hiding them would hide every path of the run.
    """
    found = []
    for name, value in environ.items():
        if is_secret_key(name) and name not in ("PWD", "OLDPWD") and len(value) >= 8:
            found.append(value)
        for user in _URL_USER.finditer(value):
            password = user["user"].partition(":")[2]
            found += [password] if len(password) >= 6 else []
    return found


def published(text: str, known: Iterable[str] = ()) -> bool:
    """Whether a text that will be written down holds a secret: a token of a published shape, `user:password@` of a URL,
    or one of ``known`` of at least 16 characters (a shorter one may stand there by chance)."""
    users = (user["user"] for user in _URL_USER.finditer(text))
    return bool(
        any(_RANDOM.search(shape[0]) for shape in _SHAPES.finditer(text))
        or any(":" in user for user in users)
        or any(len(secret) >= 16 and secret in text for secret in known)
    )


def redact(value: Any, known: Iterable[str] = ()) -> Any:
    """A copy of ``value`` in which secrets are replaced by ``[redacted]``.

    Mappings lose the strings under secret keys (whole subtrees of strings), strings lose ``user:password@`` of URLs,
    ``token=...`` and ``password: ...`` assignments, authorization headers, tokens of published shapes, and every
    string in ``known``. Numbers, booleans and None stay. Lists, tuples and mappings keep their shape (a tuple
    becomes a list). Pure: the environment is read by the caller (``known_secrets(os.environ)``).
    """
    forms = {form for secret in known for form in _forms(secret)}
    secrets = sorted(forms, key=len, reverse=True)  # longest first: a secret may contain another
    return _redact(value, secrets, hidden=False)


def _forms(secret: str) -> set[str]:
    """A secret as it stands in text, in JSON and in a URL."""
    return {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], quote(secret, safe="")}


def _redact(value: Any, secrets: list[str], hidden: bool) -> Any:
    if isinstance(value, Mapping):
        return {
            _redact_text(key, secrets) if isinstance(key, str) else key: _redact(
                entry, secrets, hidden or is_secret_key(str(key))
            )
            for key, entry in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_redact(entry, secrets, hidden) for entry in value]
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if not isinstance(value, str):
        return value
    return HIDDEN if hidden else _redact_text(value, secrets)


def _redact_text(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    text = _URL_USER.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _SHAPES.sub(HIDDEN, text)
    text = _AUTHORIZATION.sub(rf"\g<kind> {HIDDEN}", text)
    return _hide_assigned(text)


def _hide_assigned(text: str) -> str:
    """Hide the values of secret keys; a value may itself begin with a key ("error: password=..."), so keys are
    looked for one by one."""
    parts, done = [], 0
    for key in _KEY.finditer(text):
        value = (
            _VALUE.match(text, key.end()) if key.start() >= done and is_secret_key(key["key"].strip("\"'")) else None
        )
        # "token: null" and "token: true" carry no secret
        if value is not None and value[0].lower() not in {"true", "false", "null", "none"}:
            parts += [text[done : key.end()], HIDDEN]
            done = value.end()
    return "".join([*parts, text[done:]])
