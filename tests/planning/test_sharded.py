"""Plans of sharded stages: what a device holds and sends, by hand, and advice that ends in a setting that fits."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.config.ppo import PPOArguments
from pipeline.config.rewards import RewardSource
from pipeline.config.sft import SFTArguments
from pipeline.data.entries import DatasetEntry
from pipeline.errors import UserError
from pipeline.planning.advice import advice, attempts
from pipeline.planning.communication import ppo_exchange, trainer_exchange
from pipeline.planning.devices import Device
from pipeline.planning.memory import GIB, Memory, Setting, gathered_layers, ppo_memory
from pipeline.planning.parameters import parameters
from pipeline.planning.workload import Data, Model, PPOModels

from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parents[2]
LLAMA = LlamaConfig(
    vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip
GPU = Device("gpu", 80, 100, 300, 1)
POLICY, VALUE = (Model(LLAMA, parameters(LLAMA, scalar)) for scalar in (False, True))
NETWORKS = PPOModels(POLICY, VALUE, VALUE)
PROMPTS = Data(100, 10.0)
SFT = SFTArguments(parent="x", output_dir="z", datasets=[DatasetEntry(path="d")])


def setting(gpus: int, sharding: str = "fsdp2", replicas: int = 1, device: Device = GPU) -> Setting:
    return Setting(device, gpus, sharding, 0.4, 0.05, replicas)


def recipe(**changes: Any) -> PPOArguments:
    values: dict[str, Any] = {
        "parent": "x", "reward": [RewardSource(model="y")], "output_dir": "z", "datasets": [DatasetEntry(path="d")],
        "prompts_per_rollout": 64, "minibatches": 4, "max_prompt_tokens": 10, "max_response_tokens": 10, "micro_batch_tokens": 80,
    }  # fmt: skip
    return PPOArguments(**{**values, **changes})


def test_parameters_outside_layers() -> None:
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    assert (POLICY.size.largest_layer, POLICY.size.outside_layers) == (layer, 2 * 100 * 32 + 32)
    assert VALUE.size.outside_layers == 100 * 32 + 32 + 32


def test_parts_of_ppo_shrink_with_the_devices_that_share_them() -> None:
    alone = ppo_memory(recipe(ema_decay=0.9), NETWORKS, PROMPTS, setting(1, "none")).parts
    for gpus, replicas, shards in ((4, 1, 4), (4, 2, 2)):
        parts = ppo_memory(recipe(ema_decay=0.9), NETWORKS, PROMPTS, setting(gpus, replicas=replicas)).parts
        for part in ("policy", "reference", "value", "reward model", "average of the policy", "gradients", "optimizer"):
            assert parts[part] == alone[part] / shards, part
        assert "exchange buffers" not in parts, "gradients are added as they are split"


def test_a_policy_is_whole_while_it_samples_however_many_share_it() -> None:
    large = Data(100, 10.0)
    for gpus in (8, 16):
        memory = ppo_memory(recipe(micro_batch_tokens=20), NETWORKS, large, setting(gpus))
        layers = gathered_layers(POLICY, setting(gpus), activations=0)
        assert (
            layers == 2 * (POLICY.size.outside_layers + 2 * POLICY.size.largest_layer) + 6 * POLICY.size.largest_layer
        )
        sampling = memory.parts.get("whole policy, to sample")
        assert sampling in (None, 2 * POLICY.size.total)
        assert memory.whole == ({} if sampling is None else {"whole policy, to sample": sampling})
        assert memory.without_whole <= memory.total


def test_gradients_of_a_large_vocabulary_and_activations_are_not_there_at_once() -> None:
    """They are added over processes last: a pass holds its activations or those gradients, bf16 and fp32, not both."""
    wide = copy.deepcopy(LLAMA)
    wide.vocab_size = 10_000
    model = Model(wide, parameters(wide))
    layer, rest = model.size.largest_layer, model.size.outside_layers
    passes = 2 * (rest + 2 * layer) + 6 * layer
    assert gathered_layers(model, setting(8), activations=0) == 6 * rest
    assert gathered_layers(model, setting(8), activations=rest) == 5 * rest
    assert gathered_layers(model, setting(8), activations=4 * rest) == passes


def test_offloaded_parts_are_there_in_their_phase_alone() -> None:
    for where in (setting(1, "none"), setting(4)):
        whole = ppo_memory(recipe(), NETWORKS, PROMPTS, where)
        frozen = ppo_memory(recipe(offload="frozen"), NETWORKS, PROMPTS, where)
        every = ppo_memory(recipe(offload="all"), NETWORKS, PROMPTS, where)
        parts = whole.parts
        away = parts["reference"] + parts["reward model"]
        assert frozen.total >= whole.total - away, "one of them is there while it computes"
        assert every.total <= frozen.total < whole.total
    alone = setting(1, "none")
    assert "optimizer" in ppo_memory(recipe(offload="all"), NETWORKS, PROMPTS, alone).parts, (
        "the update is the largest phase"
    )
    assert frozen.parts.keys() <= whole.parts.keys()


def advised(total: float, whole: float = 0.0, **changes: Any) -> list[str]:
    """Advice of a stage that needs `total` GiB over all devices and `whole` GiB on each."""

    def measure(_: Any, where: Setting) -> Memory:
        shared = total * GIB / where.weight_shards
        kept = {"whole policy, to sample": whole * GIB} if whole else {}
        return Memory({"shared": shared, **kept}, 0, kept, shared)

    here = setting(2, "ddp")
    tried = list(attempts("ppo", recipe(**changes), here, measure))
    return advice("ppo", recipe(**changes), here, tried, measure)


def test_advice_ends_in_the_fewest_devices_that_fit() -> None:
    assert advised(600)[-1] == "--accelerate recipes/accelerate/fsdp2.yaml over 8 GPUs: 75.0 GiB, fits"
    assert advised(140)[-1] == "--accelerate recipes/accelerate/fsdp2.yaml over 2 GPUs: 70.0 GiB, fits"
    assert advised(300, prompts_per_rollout=60, minibatches=12)[-1].endswith("over 4 GPUs: 75.0 GiB, fits"), (
        "5 do not divide"
    )


def test_advice_halves_a_number_until_it_fits_and_leaves_out_what_the_model_refuses() -> None:
    def measure(changed: Any, _: Setting) -> Memory:
        if changed.gradient_checkpointing:
            raise UserError("the layers of this model cannot be recomputed")
        rows = changed.generation_rows * (1 if changed.offload == "none" else 0.5)
        return Memory({"KV cache": rows * GIB}, 0)

    here = setting(1, "none")
    changes = {"micro_batch_tokens": 512}
    tried = list(attempts("ppo", recipe(generation_rows=512, **changes), here, measure))
    assert [(attempt.words, attempt.fits) for attempt in tried] == [("generation_rows: 64", True)]
    tried = list(attempts("ppo", recipe(generation_rows=1, **changes), here, measure))
    assert [attempt.words for attempt in tried] == ["offload: frozen"]

    def much(changed: Any, where: Setting) -> Memory:
        return Memory({"KV cache": 200 * measure(changed, where).parts["KV cache"]}, 0)

    words = [attempt.words for attempt in attempts("ppo", recipe(generation_rows=8, **changes), here, much)]
    assert words[:3] == ["generation_rows: 1", "offload: frozen", "offload: all"]


def test_advice_for_one_device_under_fsdp2_is_what_fsdp2_takes() -> None:
    """It refuses quantised bases and 8-bit AdamW; a server saves the gathered policy there too."""
    for name, stage in (("ppo", recipe()), ("sft", SFT)):
        tried = attempts(name, stage, setting(1), lambda _, __: Memory({"weights": 200 * GIB}, 0))
        words = " ".join(attempt.words for attempt in tried)
        assert "4bit" not in words
        assert "8bit" not in words
        assert ("engine: vllm" in words) == (name == "ppo")


def test_advice_says_what_no_number_of_devices_changes() -> None:
    assert advised(600, whole=100)[-2:] == [
        "every device holds the whole policy, to sample (100.0 GiB), however many there are; all else fits over 8 GPUs",
        "nothing that this stage offers makes it fit; take a device of 145 GiB or a smaller model",
    ]
    assert advised(5000)[-2:] == [
        "--accelerate recipes/accelerate/fsdp2.yaml over 16 GPUs, the most that prompts_per_rollout allows: 312.5 GiB",
        "nothing that this stage offers makes it fit; take a device of 329 GiB, a larger batch, or a smaller model",
    ]


def test_bytes_of_a_trainers_step_by_hand() -> None:
    n = POLICY.size.total
    stage = SimpleNamespace(examples_per_step=16, examples_per_device=2, lora=None)
    assert trainer_exchange("sft", stage, POLICY, setting(4, "ddp")).total == 2 * 4 * n * 3 / 4
    sharded = trainer_exchange("sft", stage, POLICY, setting(4))  # two passes of each device
    assert sharded.parts == {"weights, forward and backward": 2 * 2 * 2 * n * 3 / 4, "gradients": 2 * 4 * n * 3 / 4}
    replicated = trainer_exchange("sft", stage, POLICY, setting(4, replicas=2))
    assert replicated.parts["gradients over replicas"] == 2 * 2 * (4 * n / 2) * 1 / 2
    assert (replicated.group, replicated.devices) == (2, 4)
    assert trainer_exchange("sft", stage, POLICY, setting(1, "none")).total == 0


def test_bytes_of_a_ppo_step_by_hand() -> None:
    policy, value = POLICY.size.total, VALUE.size.total
    assert ppo_exchange(recipe(), NETWORKS, PROMPTS, setting(2, "ddp")).total == 2 * 4 * (policy + value) / 2
    # 16 prompts of 20 tokens in a minibatch: two micro-batches of 80 tokens on each device; sampled and scored once a rollout.
    found = ppo_exchange(recipe(ppo_epochs=2), NETWORKS, PROMPTS, setting(2)).parts
    assert found["weights, forward and backward"] == 2 * 2 * 2 * (policy + value) / 2
    assert found["gradients"] == 2 * 4 * (policy + value) / 2
    measured = 2 * (2 * policy + value)  # policy, reference, value; four times as many tokens per pass
    assert found["weights, to sample, score and measure"] == 2 * (policy + value + measured) / 2 / 8


def test_the_tables_of_the_docs_are_the_formulas() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    from scaling_tables import tables

    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for title, table in tables().items():
        assert title in text
        assert table in text, f"{title}: run scripts/scaling_tables.py"
