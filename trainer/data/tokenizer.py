"""The tokenizer of a model: loaded, given a pad token, its chat template put in place, and known by its digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.config.hub_model import model_folder
from trainer.config.schema import Model
from trainer.data.hub import offline_if_unreachable

MAX_TEMPLATE_BYTES = 64 << 10  # the longest published templates are under 20 KiB


def load_tokenizer(model: Model) -> Any:
    """The Hugging Face tokenizer of a hub id, a folder or a .gguf file, padding on the right.

    A missing pad token becomes the end (or unknown) token. Pad is often the end token itself, so nothing may be
    masked by comparing ids with it: lengths say what is padding. Raises UserError naming `model.path` or
    `model.chat_template`.
    """
    tokenizer = _load(model)
    if model.chat_template is not None:
        tokenizer.chat_template = read_template(model.chat_template)
    _check_template(tokenizer)
    if tokenizer.pad_token_id is None:
        stand_in = tokenizer.eos_token or tokenizer.unk_token
        if stand_in is None:
            raise UserError(f"model.path: {model.path}: its tokenizer has neither pad nor end token; add one to it")
        tokenizer.pad_token = stand_in
    tokenizer.padding_side = "right"
    return tokenizer


def _load(model: Model) -> Any:
    path = Path(model.path).expanduser()
    is_file = model.path.lower().endswith(".gguf")
    looks_local = is_file or model.path.startswith(("/", "./", "../", "~")) or model.path.count("/") > 1
    if looks_local and not path.exists():
        raise UserError(f"model.path: {model.path}: no such file or folder; check the path or give a hub id")
    if path.is_dir() and not any(path.glob("*.json")) and not any(path.glob("*.model")):
        raise UserError(f"model.path: {model.path}: the folder holds no tokenizer; save one there (tokenizer.json)")
    if not path.exists():
        offline_if_unreachable()
    from transformers import AutoTokenizer  # seconds: only once the path is known to be good

    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if is_file:
        place, options["gguf_file"] = str(path.parent), path.name
    else:
        place = str(model_folder(model, weights=False))
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # the hub client and the tokenizers' own parser raise errors of any kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "check the path, id or network"
        if "custom code" in reason:
            remedy = "read that code, and set `model.trust_remote_code: true` where it may run"
        raise UserError(
            f"model.path: {model.path}: its tokenizer cannot be loaded ({reason[:200]}); {remedy}"
        ) from error


def read_template(path: str) -> str:
    """The chat template in a file. Raises UserError where it is missing, not UTF-8, empty or over 64 KiB."""
    file = Path(path).expanduser()
    try:
        if not file.is_file():
            raise UserError(f"model.chat_template: {path!r}: no such file; give the path of a Jinja template")
        with file.open("rb") as stream:
            data = stream.read(MAX_TEMPLATE_BYTES + 1)
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"model.chat_template: {path}: byte {error.start} is not UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"model.chat_template: {path}: cannot be read ({error.strerror}); check permissions") from error
    if not text.strip():
        raise UserError(f"model.chat_template: {path}: empty; write a Jinja template that prints `messages`")
    if len(data) > MAX_TEMPLATE_BYTES:
        raise UserError(f"model.chat_template: {path}: over {MAX_TEMPLATE_BYTES >> 10} KiB; shorten it")
    return text


def _check_template(tokenizer: Any) -> None:
    templates = tokenizer.chat_template
    for text in templates.values() if isinstance(templates, dict) else [templates or ""]:
        if len(text.encode()) > MAX_TEMPLATE_BYTES:
            raise UserError(
                f"model.chat_template: the tokenizer's template is over {MAX_TEMPLATE_BYTES >> 10} KiB; replace it"
            )


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of all that decides the ids: the fast tokenizer's whole state, special tokens, chat template."""
    state = (
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    parts = [
        state,
        json.dumps(tokenizer.chat_template, sort_keys=True),
        json.dumps({key: str(value) for key, value in tokenizer.special_tokens_map.items()}, sort_keys=True),
    ]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
