"""The model beneath what was trained: which tensors it has, and their frozen values, from its files or from memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.checkpoint.reader import TORCH_DTYPES
from trainer.config.schema import Model
from trainer.model.files import Stored, stored_tensors, weight_files

_ADAPTER_PARTS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "modules_to_save"}
_WRAPPER_PARTS = {"base_layer", "original_module"}


@dataclass(frozen=True)
class Described:
    """A tensor of the model as an ordinary folder holds it: quantised layers count as what they were made from."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # in which the model was loaded
    transposed: bool  # (in, out): a Conv1D's weight


@dataclass(frozen=True)
class Layout:
    """The saved tensors of a network by name; names that share one tensor are told by the one that is kept."""

    tensors: dict[str, Described]
    tied: dict[str, str]  # the other name of a shared tensor -> the kept one
    converted: bool  # whether transformers renames or regroups tensors between files and memory


class Base(Protocol):
    """Where frozen values come from."""

    def read(self, name: str) -> Tensor:
        """The value as `Described` says, on the CPU."""


def beneath(network: Any) -> Any:
    """The Hugging Face model itself, of a PeftModel the one that carries the adapter."""
    return network.get_base_model() if hasattr(network, "peft_config") else network


def layout_of(network: Any) -> Layout:
    """The tensors of a Hugging Face model, or of the one beneath a PeftModel. Keeps no reference to the network."""
    base = beneath(network)
    declared = getattr(base, "all_tied_weights_keys", None) or {}
    tensors: dict[str, Described] = {}
    kept: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, module, tensor in sorted(_members(base), key=lambda member: member[0] in declared):  # the kept name first
        if id(tensor) in kept:
            tied[name] = kept[id(tensor)]
            continue
        kept[id(tensor)] = name
        tensors[name] = _described(name, module, tensor)
    return Layout(tensors, tied, bool(conversions(base)))


def conversions(network: Any) -> list[Any]:
    """What transformers does to the names and values of this model's files on loading, and undoes on saving."""
    found = getattr(network, "_weight_conversions", None)
    if found is None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        found = [c for c in get_model_conversion_mapping(network, add_legacy=False) if not isinstance(c, PrefixChange)]
    return found


class LiveBase:
    """The values of a network in memory; quantised ones are dequantised one at a time."""

    def __init__(self, network: Any) -> None:
        self._members = {name: (module, tensor) for name, module, tensor in _members(beneath(network))}

    def read(self, name: str) -> Tensor:
        """The value on the CPU; of a quantised layer the very weights that training saw."""
        module, tensor = self._members[name]
        if _quantised(tensor):
            from transformers.integrations.bitsandbytes import dequantize_bnb_weight

            value = dequantize_bnb_weight(tensor, getattr(module, "state", None)).cpu()
            return value.T.contiguous() if _conv1d(module) else value
        return tensor.detach().cpu()


class FileBase:
    """The values in safetensors files, read one tensor at a time."""

    def __init__(self, files: dict[str, Stored], layout: Layout) -> None:
        self._files, self._layout = files, layout

    def read(self, name: str) -> Tensor:
        """The value in the dtype in which the model is loaded."""
        return read_stored(self._files[name]).to(self._layout.tensors[name].dtype)


def file_base(model: Model, layout: Layout, needed: Iterable[str]) -> FileBase | None:
    """The base model's own files as the source of the needed tensors; None where only loading gives their values.

    That is: GGUF and pickled files, quantised models, models whose tensors are converted on loading, and a new head.
    """
    needed = list(needed)
    if not needed:
        return FileBase({}, layout)
    if model.quantization != "none" or layout.converted:
        return None
    files = weight_files(model)
    if any(file.suffix != ".safetensors" for file in files):
        return None
    stored = stored_tensors(files)
    for name in needed:
        found = stored.get(name)
        if found is None or found.shape != layout.tensors[name].shape or found.dtype not in TORCH_DTYPES:
            return None
    return FileBase(stored, layout)


def read_stored(stored: Stored) -> Tensor:
    """One tensor of a safetensors file, read and not mapped: a map would count as this process's memory."""
    values = torch.empty(stored.stop - stored.start, dtype=torch.uint8)
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        if file.readinto(values.numpy().data) != len(values):
            raise OSError(f"{stored.file}: ends inside of a tensor: it was changed meanwhile")
    return values.view(TORCH_DTYPES[stored.dtype]).view(stored.shape)


def _members(base: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, module, tensor) of all that a model saves, by the names it has without an adapter's wrappers."""
    for path, module in base.named_modules(remove_duplicate=False):
        parts = path.split(".") if path else []
        if _ADAPTER_PARTS & set(parts):
            continue
        prefix = "".join(f"{part}." for part in parts if part not in _WRAPPER_PARTS)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and key not in module._non_persistent_buffers_set:
                yield prefix + key, module, tensor


def _described(name: str, module: nn.Module, tensor: Tensor) -> Described:
    transposed = name.endswith("weight") and _conv1d(module)
    shape = tuple(tensor.shape)
    if _quantised(tensor):
        shape = (module.out_features, module.in_features)  # type: ignore[assignment]
        return Described(shape[::-1] if transposed else shape, torch.float32, transposed)
    return Described(shape, tensor.dtype, transposed)


def _quantised(tensor: Tensor) -> bool:
    return type(tensor).__name__ in ("Params4bit", "Int8Params")


def _conv1d(module: nn.Module) -> bool:
    kind = getattr(module, "source_cls", type(module))  # a quantised layer remembers what it was made from
    return kind.__name__ == "Conv1D"
