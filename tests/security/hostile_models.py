"""Base models that mean harm: what each changes in a good folder, and what must be said of it."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bounds import pickled_command

Make = Callable[[Path, Path], None]  # (the model's folder, the canary)


def weights(header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> Make:
    """A model.safetensors of this header (JSON, or bytes as they are) and data."""

    def make(folder: Path, canary: Path) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = len(text) if length is None else length
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + text + data)

    return make


def tensor(start: Any = 0, stop: Any = 16, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def many(folder: Path, canary: Path) -> None:
    """A million names."""
    text = b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(1_000_000))
    weights(b"{" + text + b"}")(folder, canary)


def config(**changes: Any) -> Make:
    def make(folder: Path, canary: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return make


def text(name: str, content: str) -> Make:
    def make(folder: Path, canary: Path) -> None:
        (folder / name).write_text(content)

    return make


def large(name: str, size: int) -> Make:
    """A file of so many bytes that takes no room on the disk."""

    def make(folder: Path, canary: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, size)

    return make


def index(*names: Any) -> Make:
    """Weights named by an index alone."""

    def make(folder: Path, canary: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickled_command(canary))
        found = {"weight_map": {f"w{n}": name for n, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(found))

    return make


def pickles(*names: str, index: bool = False) -> Make:
    """Pickles in place of the weights."""

    def make(folder: Path, canary: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(pickled_command(canary))
        if index:
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w": names[0]}}))

    return make


def zipped_pickle(folder: Path, canary: Path) -> None:
    """What torch.save writes, under the name of a safetensors file."""
    with zipfile.ZipFile(folder / "model.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", pickled_command(canary))
        archive.writestr("archive/version", "3")


def raw_pickle(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickled_command(canary))


def adapter(folder: Path, canary: Path) -> None:
    """An adapter beside the model, which transformers would load with it: a pickle over somebody else's base."""
    settings = {"peft_type": "LORA", "base_model_name_or_path": "evil/base", "auto_mapping": None}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.bin").write_bytes(pickled_command(canary))


def pipe(name: str) -> Make:
    def make(folder: Path, canary: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


DEEP = "[" * 100_000 + "]" * 100_000
MODELS: dict[str, tuple[Make, str]] = {
    "pickle alone": (pickles("pytorch_model.bin"), "pytorch_model.bin: a pickle"),
    "pickles by index": (pickles("pytorch_model-00001-of-00001.bin", index=True), ".bin: a pickle"),
    "torch file": (pickles("model.pt"), "model.pt: a pickle"),
    "distributed checkpoint": (pickles("__0_0.distcp", ".metadata"), "__0_0.distcp: a pickle"),
    "pickle named safetensors": (raw_pickle, "model.safetensors: a header of"),
    "zip named safetensors": (zipped_pickle, "model.safetensors: a header of"),
    "adapter as a pickle": (adapter, "adapter_config.json: an adapter"),
    "weights named by the config": (config(transformers_weights="adapter_model.bin"), "transformers_weights"),
    "header of 2^63 bytes": (weights({}, length=1 << 63), "a header of 9223372036854775808 bytes"),
    "header past the end": (weights({}, length=1 << 20), "a header of 1048576 bytes"),
    "header cut": (weights(b"", b"", 0), "model.safetensors:"),
    "header empty": (weights({}, b""), "config.json: "),
    "header a list": (weights([]), "the header is no object"),
    "header not UTF-8": (weights(b"\xff\xfe{}"), "model.safetensors: "),
    "header nested 100,000 deep": (weights(('{"a":' * 100_000 + "}" * 100_000).encode()), "nested too deep"),
    "header of a million names": (many, "MiB, at most 16 are read"),
    "header with a name of a million letters": (weights({"x" * 1_000_000: tensor()}), "has not dtype, shape"),
    "tensors overlap": (weights({"a": tensor(), "b": tensor(8, 24)}, bytes(24)), "an overlap at tensor 'b'"),
    "tensors share bytes": (weights({"a": tensor(), "b": tensor()}), "an overlap at tensor"),
    "tensors leave a gap": (weights({"a": tensor(), "b": tensor(20, 36)}, bytes(36)), "a gap before tensor 'b'"),
    "offsets past the end": (weights({"a": tensor(0, 1600, [400])}), "its tensors end at byte"),
    "bytes left over": (weights({"a": tensor()}, bytes(99)), "its tensors end at byte"),
    "offset negative": (weights({"a": tensor(-16, 0)}), "are not counts"),
    "offsets backwards": (weights({"a": tensor(16, 0)}), "-16 bytes for F32"),
    "offset fractional": (weights({"a": tensor(0.0, 16.0)}), "are not counts"),
    "shape true": (weights({"a": tensor(0, 4, [True])}), "are not counts"),
    "shape overflows": (weights({"a": tensor(0, 16, [1 << 62, 1 << 62])}), "16 bytes for F32"),
    "shape of 10,000 dimensions": (weights({"a": tensor(0, 4, [1] * 10_000)}), "are not counts"),
    "dtype unknown": (weights({"a": tensor(dtype="OBJ")}), "unknown dtype 'OBJ'"),
    "dtype a list": (weights({"a": tensor(dtype=["F32"])}), "unknown dtype"),
    "key twice": (weights(b'{"a":%b,"a":%b}' % ((json.dumps(tensor()).encode(),) * 2)), "a key stands twice"),
    "config of 100 MB": (large("config.json", 100 << 20), "config.json: 100 MiB, at most 8"),
    "config nested 100,000 deep": (text("config.json", '{"a":' + DEEP + "}"), "config.json: nested too deep"),
    "config nested 500 deep": (config(a=json.loads("[" * 500 + "]" * 500)), "config.json: nested more than 32 deep"),
    "config a list": (text("config.json", "[]"), "config.json: holds no object"),
    "config a pipe": (pipe("config.json"), "config.json: a pipe"),
    "vocabulary of 10^12": (config(vocab_size=10**12), "config.json: vocab_size: 1000000000000: more than"),
    "a billion layers": (config(num_hidden_layers=10**9), "config.json: num_hidden_layers"),
    "hidden size of 10^15": (config(hidden_size=10**15), "config.json: hidden_size"),
    "hidden size negative": (config(hidden_size=-8), "config.json: hidden_size"),
    "number of 100,000 digits": (text("config.json", '{"vocab_size": ' + "9" * 100_000 + "}"), "config.json: not JSON"),
    "a trillion positions": (config(max_position_embeddings=10**12), "max_position_embeddings"),
    "inner sizes": (config(text_config={"hidden_size": 32, "intermediate_size": 10**12}), "intermediate_size"),
    "kernel from the hub": (config(attn_implementation="evil/kernel"), "attn_implementation: 'evil/kernel'"),
    "kernel, privately": (config(_attn_implementation_internal="evil/kernel"), "_attn_implementation_internal"),
    "kernel, inside": (config(text_config={"_attn_implementation": "evil/k"}), "_attn_implementation: 'evil/k'"),
    "auto_map of numbers": (config(auto_map={"AutoConfig": [1]}), "auto_map: not names of classes"),
    "index climbs": (index("../../model.safetensors"), "'../../model.safetensors': not the name"),
    "index absolute": (index("/etc/passwd"), "'/etc/passwd': not the name"),
    "index names a pickle": (index("pytorch_model.bin"), "'pytorch_model.bin': not the name"),
    "index names nothing there": (index("model-00001-of-00002.safetensors"), "which is not there"),
    "index of numbers": (index(1), "'1': not the name"),
    "index without a map": (index(), "has no weight_map"),
    "tokenizer of 1 GiB": (large("tokenizer.json", 1 << 30), "tokenizer.json: 1024 MiB, at most 128"),
    "tokenizer a pipe": (pipe("tokenizer.json"), "tokenizer.json: a pipe"),
    "tokenizer settings deep": (text("tokenizer_config.json", DEEP), "tokenizer_config.json: nested too deep"),
    "generation settings of 100 MB": (large("generation_config.json", 100 << 20), "generation_config.json: 100 MiB"),
    "template of 10 MB": (large("chat_template.jinja", 10 << 20), "chat_template.jinja: 10 MiB"),
}
