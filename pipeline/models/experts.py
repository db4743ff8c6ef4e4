"""Mixtures of experts: how many experts a model has, and the loss that keeps their load balanced."""

from __future__ import annotations

from typing import Any

from pipeline.errors import UserError

from transformers import PreTrainedConfig

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def expert_counts(config: PreTrainedConfig) -> set[int]:
    """Numbers of experts that a configuration names; empty for a dense model."""
    text = config.get_text_config()
    counts = {getattr(text, name, None) for name in EXPERT_COUNTS}
    return {count for count in counts if isinstance(count, int) and count > 1}


def set_router_loss(model: Any, weight: float | None, forward_passes: int) -> str | None:
    """Give a mixture of experts its load-balancing loss (Fedus et al. 2022, eq. 4); returns what to say, or None.

    transformers adds the loss of each forward pass whole, so its weight is divided by the passes of one optimizer step.

    Args:
        weight: the recipe's `router_aux_loss`; None or 0 for none.
        forward_passes: of one optimizer step, over all processes.

    Raises:
        UserError: a weight for a model that has no such loss.
    """
    mixture = bool(expert_counts(model.config))
    if not weight:
        return (
            "a mixture of experts is trained without a load-balancing loss (`router_aux_loss: 0`)" if mixture else None
        )
    if not hasattr(model, "router_aux_loss_coef"):
        raise UserError(f"router_aux_loss: {type(model).__name__} has no load-balancing loss; leave the key out")
    model.router_aux_loss_coef = weight / forward_passes
    return None
