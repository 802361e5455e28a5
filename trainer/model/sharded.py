"""A network whose weights stay in their files, so that each rank reads the part that it will hold, and no more.

transformers builds and loads the network as ever: it decides on names, dtypes, ties, fresh heads and buffers. In place
of each stored tensor it gets a stand-in, one element spread over the tensor's shape, which remembers where the values
lie. Stand-ins lie on the CPU and not on the meta device, because adapters are put where the weight beside them is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.config.schema import Model
from trainer.model.blocks import blocks
from trainer.model.files import Stored, stored_tensors, weight_files
from trainer.model.root import Trainee, Unread

log = logging.getLogger(__name__)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK_BYTES = 16 << 20  # read at once, so that a part is never in memory twice


class CannotShard(Exception):
    """Why a base model has to be loaded whole by every rank."""


@dataclass(frozen=True)
class InFile:
    """The values of a parameter in a safetensors file, and the dtype in which loading takes them from there."""

    stored: Stored
    dtype: torch.dtype

    def read(self, part: Tensor, start: int) -> None:
        """Fill `part`, 1-D and contiguous, with the elements of the flattened tensor from `start` on."""
        kind = DTYPES[self.stored.dtype]
        with self.stored.file.open("rb") as file:
            file.seek(self.stored.start + start * kind.itemsize)
            for values in part.split(CHUNK_BYTES // kind.itemsize):
                chunk = torch.empty(values.numel(), dtype=kind)
                if file.readinto(chunk.view(torch.uint8).numpy().data) != chunk.nbytes:
                    raise OSError(f"{self.stored.file}: ended within a tensor: it changed while it was read")
                values.copy_(chunk.to(self.dtype))


class _StandIn:
    """What transformers' loader takes for a slice of a file: indexing it and `to` would read."""

    def __init__(self, stored: Stored, made: dict[int, InFile]) -> None:
        self.stored, self.made = stored, made

    def __getitem__(self, index: Any) -> _StandIn:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """One NaN spread over the tensor's shape: whatever would compute with it shows."""
        source = InFile(self.stored, dtype or DTYPES[self.stored.dtype])
        self.one = torch.full((1,), torch.nan, dtype=source.dtype)  # kept: nothing else may come to lie there
        self.made[self.one.data_ptr()] = source
        return self.one.expand(self.stored.shape) if self.stored.shape else self.one.reshape(())


def outline(settings: Model, auto: Any, arguments: Mapping[str, Any], seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """What `auto.from_pretrained` gives, but for weights: those are stand-ins with an attribute `unread`.

    The second is transformers' report of keys.

    Fresh parameters (a new classification head, drawn from the seed) and buffers are real and equal to those of the
    whole loading. Raises CannotShard for what is not proved to come out the same.
    """
    import transformers  # seconds to import: after the recipe was checked

    if settings.quantization != "none":
        raise CannotShard("weights are quantised on loading, each tensor as a whole")
    files = weight_files(settings)
    if files[0].suffix == ".gguf":
        raise CannotShard("a .gguf file is dequantised tensor by tensor")
    if settings.trust_remote_code:
        raise CannotShard("the model's own code may do anything with its weights")
    tensors = stored_tensors(files)
    strange = next((name for name, tensor in tensors.items() if tensor.dtype not in DTYPES), None)
    if strange:
        raise CannotShard(f"{strange} is stored as {tensors[strange].dtype}")
    folder, options = files[0].parent, dict(arguments)
    dtype = options.pop("dtype")
    options.pop("use_safetensors")
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    if getattr(config, "quantization_config", None):
        raise CannotShard("its files hold quantised weights")
    with torch.device("meta"):
        shell = auto.from_config(config, dtype=dtype)
    _check_conversions(shell, tensors)
    made: dict[int, InFile] = {}
    stand_ins = {name: _StandIn(tensor, made) for name, tensor in tensors.items()}
    torch.manual_seed(seed)
    network, report = type(shell).from_pretrained(
        None, config=shell.config, state_dict=stand_ins, dtype=dtype, output_loading_info=True
    )
    network.config.name_or_path = network.name_or_path = str(folder)
    if network.can_generate():
        network.generation_config = _generation_config(folder)
    for target, source in shell.all_tied_weights_keys.items():  # not tied, since stand-ins are never equal
        if network.get_parameter(target) is not network.get_parameter(source):
            raise CannotShard(f"{target} and {source} are one by the configuration, and both are stored")
    _mark(network, made, settings)
    return network, report


def _check_conversions(shell: nn.Module, tensors: Mapping[str, Stored]) -> None:
    """Renamed tensors are followed; regrouped ones (experts stacked, projections split) are not."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    converters = [c for c in get_model_conversion_mapping(cast(Any, shell)) if isinstance(c, WeightConverter)]
    for name in tensors:
        if any(converter.rename_source_key(name)[1] is not None for converter in converters):
            raise CannotShard(f"{name} is regrouped with others on loading")


def _generation_config(folder: Path) -> Any:
    """As from_pretrained finds it: the file, else the older keys of config.json."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def _mark(network: Any, made: Mapping[int, InFile], settings: Model) -> None:
    """Hang the source on each stand-in; what is small and may be copied (buffers, a stored head) is read at once."""
    inside = {id(p) for block in blocks(network) for p in block.parameters()}
    inside |= {id(p) for p in network.get_input_embeddings().parameters()}
    for name, module in network.named_modules():
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            source = made.get(tensor.data_ptr()) if tensor.numel() else None
            if source is None:
                continue
            if tensor.shape != source.stored.shape or not stands_in(tensor):
                raise CannotShard(f"{name}.{key} is not stored as it is")
            tensor.unread = source
            if key in module._buffers or (settings.kind == "classification" and id(tensor) not in inside):
                tensor.data = torch.empty(tensor.shape, dtype=source.dtype)
                source.read(tensor.data.view(-1), 0)
                del tensor.unread


def stands_in(tensor: Tensor) -> bool:
    """Whether a tensor is one element spread over its shape."""
    return not any(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in fp32; a stand-in stays one."""
    if tensor.numel() > 1 and stands_in(tensor):
        return tensor[(0,) * tensor.dim()].float().expand(tensor.shape)
    return tensor.float()


def unread_parameters(trainee: Trainee) -> dict[str, Unread]:
    """By name the parameters that are still in files. Raises CannotShard where a method copied a stand-in."""
    found: dict[str, Unread] = {}
    for name, parameter in trainee.named_parameters():
        if hasattr(parameter, "unread"):
            found[name] = parameter.unread
        elif parameter.numel() and parameter[(0,) * parameter.dim()].isnan():
            raise CannotShard(f"{name} is made from weights that are not loaded yet")
    return found
