"""DeepSpeed ZeRO 1, 2 and 3: optimizer state, gradients and (3) parameters partitioned over the ranks.

DeepSpeed partitions, reduces, gathers and offloads; the update is `engine.update`, over the flat fp32 partitions that
`zero_slots` finds. So `deepspeed.initialize` runs once, a stage's fresh optimizers are ordinary ones over the same
partitions, and DeepSpeed's own step, clipping and schedules are never called.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config import UserError
from trainer.config.deepspeed import read_config
from trainer.config.schema import Engine as EngineSettings
from trainer.config.schema import Optimizer
from trainer.engine import NOT_INSTALLED
from trainer.engine.base import Pull, Replica, Slot, flat
from trainer.engine.update import Updater
from trainer.engine.zero_slots import partitions
from trainer.model.root import Trainee
from trainer.optim import build_optimizers, parameter_groups
from trainer.world import World

log = logging.getLogger(__name__)


class DeepSpeedEngine:
    """A trainee under ZeRO. `model` is the module itself: evaluation, generation and probes call it without touching
    DeepSpeed's gradient accounting, which `backward` alone moves on."""

    def __init__(
        self, model: Trainee, settings: Optimizer, lr: float, engine: EngineSettings, dtype: torch.dtype, world: World
    ) -> None:
        self.model = model
        self.model.device_type = world.device.type
        self.world = world
        config = read_config(engine.config)
        self.stage: int = config["zero_optimization"]["stage"]
        config |= _ours(self.stage, dtype)
        if model.unread:
            read_partitions(model, config, world)
        self._trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        masters = lower(model, dtype)
        self._deepspeed = initialize(model, config, self._trainable, world)
        self._zero = self._deepspeed.optimizer
        self._partitions = partitions(self._zero, {id(p): name for name, p in self._trainable})
        self.configure(settings, lr)
        for slot in self.slots():  # DeepSpeed made its masters from the lowered parameters
            for piece in slot.pieces:
                if piece.name in masters:
                    start, values = masters[piece.name]
                    first = piece.start - start
                    slot.value(piece).copy_(values[first : first + piece.numel])

    def configure(self, settings: Optimizer, lr: float) -> None:
        """New optimizers with fresh state, as a stage with its own settings needs them."""
        parts, kinds = self._partitions.parts, self._partitions.kinds
        named = [(name, part.tensor) for (name, _), part in zip(kinds, parts, strict=True)]
        self.updater = Updater(parts, build_optimizers(settings, lr, named, dict(kinds)), settings.clip, self.world)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch; they are reduced over ranks at `last` (stage 1) or each time (2, 3).

        What `deepspeed_engine(...)` and its hooks on the outputs would do before a backward is done here instead.
        """
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._zero.clear_backward_seen_flag()
        self._deepspeed._backward_prologue()
        if self.stage == 3:
            loss = loss * self.world.size  # it knows no sums and divides by the ranks
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self, lr_factor: float, *, pull: Pull, apply: bool = True) -> float:
        """Clip, pull, update, zero; the gradient norm before clipping."""
        self._partitions.collect()
        norm = self.updater.step(lr_factor, pull, apply)
        self._partitions.drop()
        if apply and math.isfinite(norm):
            self._partitions.publish()
        return norm

    def slots(self) -> Iterator[Slot]:
        """One slot for each flat partition of this rank."""
        return self.updater.slots()

    def writes(self, slot: Slot) -> bool:
        """Partitions are nobody else's."""
        return True

    def replicas(self) -> Iterator[Replica]:
        """The model's trainable parameters, whole on every rank; under stage 3 only the small ones that stay so."""
        ranks = tuple(range(self.world.size))
        for name, parameter in self._trainable if len(ranks) > 1 else ():
            if self.stage < 3 or getattr(parameter, "ds_persist", False):
                yield Replica(name, flat(parameter), ranks)

    def prepare_state(self) -> None:
        """Zero optimizer state for every slot."""
        self.updater.prepare_state()

    def after_load(self) -> None:
        """Bring the model's parameters in line with the partitions on all ranks."""
        self._partitions.publish()


def _ours(stage: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the recipe and the step decide, in DeepSpeed's words.

    Gradients are accumulated and reduced in fp32, as under the other engines, and summed: the step has divided by
    counts over all ranks already. Accumulation is told to each backward, so DeepSpeed counts no micro-batches.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_allreduce_op": "sum" if stage < 3 else "mean",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def initialize(
    model: Trainee, config: dict[str, Any], trainable: list[tuple[str, torch.nn.Parameter]], world: World
) -> Any:
    """DeepSpeed's engine over the model, in place, in the process group that is there."""
    deepspeed = load_deepspeed(world)
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trainable}
    # Its groups say how parameters are laid end to end: by whether they decay. It is never stepped.
    layout = torch.optim.SGD(parameter_groups(list(trainable), shapes, 0.0), lr=0.0)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        engine, *_ = deepspeed.initialize(model=model, optimizer=layout, config=config)
    log.info("deepspeed: %s", printed.getvalue().strip() or "started")
    if config["zero_optimization"]["stage"] == 3:
        for module in model.modules():
            for parameter in getattr(module, "outer_parameters", lambda: ())():
                deepspeed.zero.register_external_parameter(module, parameter)
    return engine


def lower(model: Trainee, dtype: torch.dtype) -> dict[str, tuple[int, Tensor]]:
    """Cast the floating parameters to the compute dtype, in place, those already partitioned too.

    Returns the fp32 values of what trains, {name: (first element held, values 1-D)}: they stay the masters' values.
    """
    masters = {}
    parameter: Any  # with DeepSpeed's attributes once it is partitioned
    for name, parameter in model.named_parameters():
        held = getattr(parameter, "ds_tensor", parameter)
        if held.dtype == dtype or held.dtype not in (torch.float32, torch.bfloat16):
            continue
        if parameter.requires_grad:
            rank = dist.get_rank(parameter.ds_process_group) if held is not parameter else 0
            masters[name] = rank * held.numel(), held.data.view(-1)
        held.data = held.data.to(dtype)
        if held is not parameter:
            parameter.data = parameter.data.to(dtype)  # empty: what it is gathered into takes this dtype
    return masters


def read_partitions(model: Trainee, config: dict[str, Any], world: World) -> None:
    """Partition the parameters whose values are still in files, and read this rank's part of each; stage 3."""
    init = load_deepspeed(world).zero.Init(config_dict_or_path=config)
    init._enable_mem_efficient_linear()  # as where it gets a whole model: no view keeps gathered weights alive
    parameter: Any
    for name, parameter in model.named_parameters():
        if name in model.unread:
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=init.local_device)
            init._convert_to_deepspeed_param(parameter)
            parameter.partition()
            part = parameter.ds_tensor.data.view(-1)  # ceil(numel / ranks): the last may reach over the end
            start = world.rank * part.numel()
            held = max(0, min(part.numel(), parameter.ds_numel - start))
            model.unread[name].read(part[:held], start)
            part[held:].zero_()
    for buffer in model.buffers():  # of a model that comes partitioned DeepSpeed moves nothing else
        buffer.data = buffer.data.to(init.local_device)
    model.unread.clear()


def load_deepspeed(world: World) -> Any:
    """The package, quiet unless TUNESMITH_LOG asks, on the CPU where there is no GPU. Raises UserError without it."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed  # 1.5 s, and optional: only for the recipes that name it
    except ImportError as error:
        raise UserError(NOT_INSTALLED) from error
    from deepspeed.utils import logger

    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # it asks for it even where no launcher was
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)  # its own calls
    level = os.environ.get("TUNESMITH_LOG", "ERROR")
    for target in (logger, *logger.handlers):
        target.setLevel(level)
    _adopt_process_group(deepspeed)
    return deepspeed


def _adopt_process_group(deepspeed: Any) -> None:
    """Let DeepSpeed use this run's process group, and none that it remembers of an earlier run in this process.

    Its shared-memory collectives serve inference alone; left on, every first start on a CPU would compile them.
    """
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if comm.cdb is not None and groups._WORLD_GROUP in dist.distributed_c10d._world.pg_map:
        return
    groups._release_process_group_references()
    comm.cdb = None
    deepspeed.init_distributed()
    groups._clone_world_group()
