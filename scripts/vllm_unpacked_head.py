"""For a vLLM server on a CPU: an LM head that follows the embedding it is tied to when weights are reloaded.

vLLM 0.32 packs the head's weights for the CPU once, when the model is loaded, and `reload_weights` packs a tied head no more: it
answers with the new layers under the old head (measured: 0.8 nats per token, and 1e-6 with the old head put into the new model).
Here the head multiplies with the embedding's weights as they are. `scripts/rollout_server.sh` hands this file to vLLM on CPUs
(`--worker-extension-cls`). If a later vLLM has other names, the server does not start; if it packs elsewhere, the trainer's probe ends
the run.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

assert callable(UnquantizedEmbeddingMethod.process_weights_after_loading)


def keep_unpacked(self: Any, layer: torch.nn.Module) -> None:
    layer.cpu_linear = torch.nn.functional.linear


UnquantizedEmbeddingMethod.process_weights_after_loading = keep_unpacked


class WorkerExtension:
    """vLLM imports this module for it, in each worker, before the model is loaded."""
