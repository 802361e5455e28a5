"""The root module: the network, and inside its forward the choice of supervised positions and the head.

Parallel engines gather sharded weights in the root's forward; calling the inner network and the head apart would bypass
that. So whatever touches the head's weight is a `readout` that the root calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from trainer.data.batch import Batch

Result = TypeVar("Result")
Readout = Callable[[Tensor, nn.Module], Result]
"""(selected hidden states (targets, width), head) -> anything; called inside the root's forward."""


class Unread(Protocol):
    """Where the values of a parameter wait that no rank holds yet."""

    def read(self, part: Tensor, start: int) -> None:
        """Fill `part`, 1-D and contiguous, with the elements of the flattened parameter from `start` on."""


class Trainee(nn.Module):
    """A Hugging Face network (or its PeftModel) with one forward for training and evaluation."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        base = getattr(network, "get_base_model", lambda: network)()
        self.config: Any = base.config
        self.device_type = "cpu"
        self.unread: dict[str, Unread] = {}  # by parameter name; the engine reads its own part of each
        self.classifies = not hasattr(base, "lm_head") and hasattr(self.config, "num_labels") and _has_class_head(base)
        self.encoder = self.classifies and not hasattr(base, "score")

    @property
    def base(self) -> Any:
        """The Hugging Face model beneath a PeftModel, or the network itself."""
        return getattr(self.network, "get_base_model", lambda: self.network)()

    @property
    def embeddings(self) -> nn.Module:
        """The input embedding: adversarial passes perturb its output."""
        return self.base.get_input_embeddings()

    @property
    def head(self) -> nn.Module:
        """What turns a selected hidden state into logits; the identity for encoders, whose own head pools."""
        if self.encoder:
            return nn.Identity()
        return self.base.score if self.classifies else self.base.get_output_embeddings()

    def waiting(self) -> list[nn.Parameter]:
        """The parameters whose values are still `unread`."""
        return [parameter for name, parameter in self.named_parameters() if name in self.unread]

    def forward(self, batch: Batch, readout: Readout[Result]) -> Result:
        """`readout` of the hidden states (targets, width) at `batch.target_index` and the head."""
        if self.encoder:
            logits = self.base(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
            return readout(logits[batch.target_example], self.head)
        hidden = self.hidden(batch)
        selected = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.target_index)
        return readout(selected, self.head)

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states (rows, length, width)."""
        backbone = getattr(self.base, self.base.base_model_prefix)
        if batch.packed:
            arguments = packed_arguments(batch)
        else:
            arguments = {"attention_mask": batch.mask.long()}
        return backbone(
            input_ids=batch.ids, position_ids=batch.positions, use_cache=False, **arguments
        ).last_hidden_state

    def outer_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of inner modules that a readout reads itself: a plain linear head is fused with its loss.

        An engine that gathers weights module by module must gather these with the root.
        """
        return self.head.parameters() if type(self.head) is nn.Linear else iter(())

    def within_forward(self, work: Callable[[], Result]) -> Result:
        """`work()` inside the root's forward, where sharded weights are gathered; a forward method for sharding."""
        return work()

    def generate(self, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
        """Greedy or sampled continuation (rows, length + new) of left-padded prompts; a forward method for sharding."""
        # The network hands its head the last position as a strided view; on a CPU the product then copies the head's
        # weight once for each row of the batch: 0.7 s of a 1.9 s prefill for 8 rows of a 135M model.
        compact = self.head.register_forward_pre_hook(lambda head, inputs: (inputs[0].contiguous(), *inputs[1:]))
        try:
            with torch.no_grad():
                return self.network.generate(input_ids=ids, attention_mask=mask, **options)  # type: ignore[operator]
        finally:
            compact.remove()


def _has_class_head(base: nn.Module) -> bool:
    return any(hasattr(base, name) for name in ("score", "classifier"))


def packed_arguments(batch: Batch) -> dict[str, Any]:
    """The forward arguments by which packed attention knows where documents begin (as flash attention names them)."""
    lengths = batch.lengths if len(batch.example_ids) else batch.lengths.new_tensor([batch.ids.shape[1]])
    borders = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    borders[1:] = lengths.cumsum(0)
    longest = int(lengths.max())
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}


def logit_softcap(config: Any) -> float | None:
    """The cap c of logits c * tanh(logits / c) that some models apply after the head (Gemma 2)."""
    return getattr(config, "final_logit_softcapping", None)
