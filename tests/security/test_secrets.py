"""Twelve secrets in the environment, and none of them in anything that a run writes, says or is called."""

from __future__ import annotations

import base64
import binascii
import gzip
import io
import json
import logging
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from finished import CANARIES, MARKS, FinishedRun, environment

from trainer.check import check_secrets
from trainer.config import UserError
from trainer.tracking.redact import known_secrets, published, redact
from trainer.tracking.streams import RedactedStream
from trainer.tracking.wandb_feed import _own_environment


def forms(secret: str) -> Iterator[bytes]:
    """A secret as bytes: plain, in JSON, in a URL, in base64 at each of its offsets, in hexadecimal, in UTF-16."""
    yield secret.encode()
    yield json.dumps(secret)[1:-1].encode()
    yield quote(secret, safe="").encode()
    for pad in range(3):
        coded = base64.b64encode(b"\0" * pad + secret.encode())
        yield coded[-(-pad * 8 // 6) :].rstrip(b"=")[:-1]
    yield binascii.hexlify(secret.encode())
    yield secret.encode("utf-16-le")


def unpacked(data: bytes) -> Iterator[bytes]:
    """The bytes, and what they unpack to where they are compressed."""
    yield data
    if data.startswith(b"\x1f\x8b"):
        yield gzip.decompress(data)
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield from unpacked(archive.read(name))
    for start in (place for head in (b"\x78\x9c", b"\x78\xda", b"\x78\x01") for place in _places(data, head)):
        try:
            yield zlib.decompressobj().decompress(data[start:], 1 << 24)
        except zlib.error:  # two bytes that look like a header
            continue


def _places(data: bytes, head: bytes) -> list[int]:
    return [place for place in range(len(data) - 1) if data[place : place + 2] == head][:200]


def leaks(data: bytes) -> list[str]:
    secrets = dict(zip(MARKS, CANARIES.values(), strict=True)) | {"proxy": "canary12pw"}
    texts = [text for part in unpacked(data) for text in (part, part.lower())]
    return [
        mark
        for mark, secret in secrets.items()
        if any(form in text for form in forms(secret) for text in texts) or any(mark.encode() in text for text in texts)
    ]


def found(run: FinishedRun) -> dict[str, list[str]]:
    places = (run.folder, run.cache)
    files = {path: path.read_bytes() for place in places for path in place.rglob("*") if path.is_file()}
    named = {f"the name of {path}": str(path).encode() for path in files}
    said = {"what it said": run.said.encode(), "what it was called": b"\n".join(run.called)}
    return {str(place): leak for place, data in (files | named | said).items() if (leak := leaks(data))}


def test_the_search_finds_secrets() -> None:
    secret = CANARIES["AWS_SECRET_ACCESS_KEY"]
    for data in (
        secret.encode(), base64.b64encode(b"api:" + secret.encode()), base64.b64encode(b"x" + secret.encode()),
        binascii.hexlify(secret.encode()), gzip.compress(secret.encode()), b"xx" + zlib.compress(secret.encode()),
        secret.encode("utf-16-le"), quote(secret, safe="").encode(),
    ):  # fmt: skip
        assert "canary04" in leaks(data)
    assert leaks(b"nothing here") == []


@pytest.mark.timeout(400)
def test_no_secret_in_anything_of_a_run(finished_run: FinishedRun) -> None:
    assert found(finished_run) == {}
    assert any(b"wandb_process" in call for call in finished_run.called)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_no_secret_in_an_export_or_a_traceback(exported_run: FinishedRun) -> None:
    assert found(exported_run) == {}
    assert "Traceback" in exported_run.said


def verb(tmp_path: Path, *arguments: str) -> str:
    """What a verb that fails says, on both streams."""
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *arguments],
        env=environment(tmp_path / "cache"), cwd=tmp_path, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert done.returncode != 0
    return done.stdout + done.stderr


def test_errors_and_tracebacks_name_no_secret(tmp_path: Path) -> None:
    """A secret in an argument, in a path, in a value: the message comes without it, and so does the traceback."""
    secret = CANARIES["MY_SERVICE_CREDENTIALS"]
    (tmp_path / f"{secret}.yaml").write_text("name: [\n")
    said = verb(tmp_path, "--debug", "check", f"{secret}.yaml", "--no-data")
    assert "mend the YAML" in said and "[redacted]" in said and "Traceback" in said and leaks(said.encode()) == []
    said = verb(tmp_path, "check", "none.yaml", f"--{secret}")
    assert "No such option" in said and leaks(said.encode()) == []


URL = "https://somebody:s3cr3t-canary@data.example/x"


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"model": {"path": URL}}, "model.path"),
        ({"sources": {"s": {"path": URL + ".jsonl"}}}, "sources.s.path"),
        ({"model": {"path": "hf_" + "a1" * 17}}, "model.path"),
        ({"name": "ghp_" + "A1" * 18}, "name"),
        ({"sources": {"s": {"system": "Use AKIAABCDEFGHIJKLMNOP to log in."}}}, "sources.s.system"),
        ({"tracking": {"project": "known-by-the-environment-alone"}}, "tracking.project"),
        ({"stages": [{"mixture": {}}, {"name": "sk-" + "x9" * 20}]}, "stages.1.name"),
    ],
)
def test_a_secret_in_the_recipe_is_refused(data: Any, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "known-by-the-environment-alone")
    with pytest.raises(UserError) as caught:
        check_secrets(data)
    assert str(caught.value).startswith(f"{key}: holds a secret") and "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "data/sk-learn-reviews-2024-v2/train.jsonl", "owner/model", "https://host:8080/x", "s3://bucket@v2/x",
        "password: ask the user for it", "runs/short", "the token count is 5",
    ],
)  # fmt: skip
def test_ordinary_values_are_not_taken_for_secrets(text: str) -> None:
    assert not published(text, ["short", "runs"])


def test_what_is_known_of_an_environment() -> None:
    environ = {
        "PGPASSWORD": "12345678", "HTTPS_PROXY": "http://me:proxypw@host:1", "DATABASE_URL": "postgres://u:dbpass@h/d",
        "HOME": "/root", "PWD": "/root/secret-place", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    assert sorted(known_secrets(environ)) == ["12345678", "dbpass", "proxypw"]


def test_forms_of_a_secret_are_redacted() -> None:
    secret = 'a"b/c d\\e+é'
    for form in (secret, json.dumps(secret), quote(secret, safe=""), json.dumps(secret, ensure_ascii=False)):
        assert "[redacted]" in redact(f"<{form}>", [secret]) and "b/c" not in redact(form, [secret])


def test_logs_and_standard_error_are_redacted() -> None:
    written = io.StringIO()
    stream: Any = RedactedStream(written, ["s3cr3t-value"])
    logger = logging.Logger("somewhere")
    logger.addHandler(logging.StreamHandler(stream))
    try:
        raise ValueError("with s3cr3t-value in it")
    except ValueError:
        logger.exception("at %s", "https://me:other@host")
    stream.writelines(["s3cr3t-value\n"])
    print("s3cr3t-value", file=stream)
    assert "s3cr3t" not in written.getvalue() and "other@" not in written.getvalue()
    assert written.getvalue().count("[redacted]") == 5 and stream.closed is False


def test_wandbs_process_gets_wandbs_secrets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, secret in CANARIES.items():
        monkeypatch.setenv(name, secret)
    given = _own_environment()
    assert "WANDB_API_KEY" in given and "PATH" in given
    assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "GITHUB_TOKEN"} & set(given)
