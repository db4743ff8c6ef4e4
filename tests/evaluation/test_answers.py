"""The report samples as PPO sampled: its stop and forbidden tokens, length and temperature."""

from __future__ import annotations

from pathlib import Path

from helpers.ppo_training import with_training
from helpers.worlds import make_policy
from pipeline.evaluation.answers import load_sampler
from pipeline.rollout.engine import SamplingSettings


def test_the_reports_sampling_is_that_of_ppo(tmp_path: Path) -> None:
    """`<|user|>` as a further stop token: it is then sampled, and ends an answer, in both."""
    policy = make_policy(tmp_path / "sft", "abcd")
    changes = {"stop_tokens": ["<|user|>"], "temperature": 0.7, "max_response_tokens": 5, "generation_rows": 3}
    recipe, used = with_training(
        tmp_path / "run",
        policy,
        "return 0.0",
        lambda training, run: (vars(run.args), training.collector.engine.settings),
        **changes,
    )
    sampler = load_sampler(policy, recipe)
    assert isinstance(used, SamplingSettings)
    for name in ("stop_ids", "forbidden_ids"):
        assert sorted(getattr(sampler.settings, name)) == sorted(getattr(used, name)), name
    token = sampler.encoder.tokenizer.convert_tokens_to_ids("<|user|>")
    assert token in used.stop_ids
    assert token not in used.forbidden_ids
    for name in ("max_new_tokens", "temperature", "rows", "pad_id"):
        assert getattr(sampler.settings, name) == getattr(used, name), name
