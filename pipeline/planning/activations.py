"""Memory of one training step beside weights, gradients and optimizer, from a config alone.

A step is run on fake tensors (shapes and no data) under torch's own memory tracker, with four and with six layers; what a
layer adds is then counted for all of them. So no model has to fit anywhere, and 96 layers take as long as six.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from dataclasses import dataclass
from typing import Any

from pipeline.models.loading import checkpoint_activations
from pipeline.planning.parameters import ConfigKey, build, has_experts, layers_of, parameters, with_layers

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

LAYERS = (4, 6)  # few, but the peak of memory is at the same place as in a deep model


@dataclass(frozen=True)
class Step:
    """A forward and backward pass.

    rows, length: of its tokens.
    head: "causal" (logits of all positions, as transformers' Trainer makes them), "tiles" (none at once, as TRL's fused
        head in SFT; its tiles are left out), "score" (one per row), "value" (one per position), or "response" (logits of
        the last `response` positions of each row, in chunks of `logits_bytes`).
    precision: "fp32"; "autocast" (bf16 over fp32 weights: the bf16 copies of all weights count); "bf16" (weights gathered
        in bf16 a layer at a time, as sharded backends do).
    checkpointing: activations are recomputed in the backward pass.
    """

    rows: int
    length: int
    head: str = "causal"
    response: int | None = None
    precision: str = "fp32"
    checkpointing: bool = False
    logits_bytes: int | None = None

    @property
    def scalar(self) -> bool:
        return self.head in ("score", "value")

    @property
    def read_positions(self) -> int:
        """Positions at the end of each row that the head reads."""
        return self.response or self.length


def step_memory(config: PreTrainedConfig, step: Step) -> int:
    """Bytes that a step adds to weights, gradients and optimizer at its peak.

    LoRA keeps the same activations: every adapter needs its layer's input, as the layer's own weight would.
    """
    return _step_memory(ConfigKey(config), step)


@functools.lru_cache(maxsize=256)
def _step_memory(key: ConfigKey, step: Step) -> int:
    depth = layers_of(key.config)
    if depth <= LAYERS[1]:
        return fake_step(key.config, step)
    few, more = (fake_step(with_layers(key.config, n), step) for n in LAYERS)
    return max(0, few + (more - few) * (depth - LAYERS[0]) // (LAYERS[1] - LAYERS[0]))


def _step_with_experts(config: PreTrainedConfig, step: Step) -> int:
    """As `fake_step`, estimated: torch 2.13 runs grouped experts on fake tensors in bf16 alone.

    fp32 takes twice as much; autocast takes as much, and a bf16 copy of every weight.
    """
    in_bf16 = fake_step(config, dataclasses.replace(step, precision="bf16"))
    copies = 2 * parameters(config, step.scalar).total if step.precision == "autocast" else 0
    return in_bf16 * (2 if step.precision == "fp32" else 1) + copies


def fake_step(config: PreTrainedConfig, step: Step) -> int:
    """The same with exactly the config's layers."""
    if has_experts(config) and step.precision != "bf16":
        return _step_with_experts(config, step)
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dtype = torch.bfloat16 if step.precision == "bf16" else torch.float32
        model = build(config, step.scalar, dtype).train()
        if step.checkpointing:
            checkpoint_activations(model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        tracker = peak_tracker()
        tracker.track_external(model)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=step.precision == "autocast"):
                loss = _loss(model, step)
            loss.backward()
        peak = by_part(tracker)
    return peak["Total"] - sum(peak.get(part, 0) for part in ("PARAM", "GRAD", "BUFFER", "OPT"))


def peak_tracker() -> Any:
    """torch's tracker without its peaks of each module, which take half of its time; the peak of all is what we read."""
    from torch.distributed._tools.mem_tracker import MemTracker

    class Peak(MemTracker):
        def _update_peak_stats(
            self, peak_state: Any
        ) -> None:  # were it renamed, modules would be tracked again, no more
            tracked, self.memory_tracking = self.memory_tracking, type(self.memory_tracking)()
            super()._update_peak_stats(peak_state)
            self.memory_tracking = tracked

    return Peak()


def by_part(tracker: Any) -> dict[str, int]:
    """Bytes at the peak by torch's names: PARAM, GRAD, ACT, TEMP, OPT, BUFFER."""
    peak: dict[str, int] = {}
    for sizes in tracker.get_tracker_snapshot("peak").values():
        for kind, size in sizes.items():
            name = getattr(kind, "name", str(kind))
            peak[name] = peak.get(name, 0) + size
    return peak


def _loss(model: Any, step: Step) -> Any:
    ids = torch.zeros(step.rows, step.length, dtype=torch.long)
    positions = torch.arange(step.length)[None].expand(step.rows, step.length)
    if step.head == "score":
        return model(input_ids=ids, use_cache=False).logits.float().sum()
    if step.head == "value":
        backbone = getattr(model, model.base_model_prefix)
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
        return model.score(hidden[:, -step.read_positions :])[..., 0].float().sum()
    if step.head == "tiles":
        return model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.float().sum()
    if step.head == "causal":
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
    from torch.utils.checkpoint import checkpoint

    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    picked = hidden[:, -step.read_positions :].flatten(0, 1)
    table = model.get_output_embeddings()
    chunk = max(1, (step.logits_bytes or 2**62) // (4 * table.weight.shape[0]))

    def run(states: Any) -> Any:
        return torch.log_softmax(F.linear(states, table.weight).float(), -1)[:, 0].sum()

    pieces = picked.split(chunk)
    many = len(pieces) > 1
    return sum(checkpoint(run, piece, use_reentrant=False) if many else run(piece) for piece in pieces)
