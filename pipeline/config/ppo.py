"""Keys of the PPO stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.engine import check_engine
from pipeline.config.keys import key
from pipeline.config.rewards import RewardSource
from pipeline.config.stage import StageArguments
from pipeline.config.trainer import LoraOptions
from pipeline.data.entries import DatasetEntry

Schedule = Literal["linear", "constant", "cosine"]


@dataclass(frozen=True, kw_only=True)
class PPOArguments(StageArguments):
    """PPO from the SFT policy against a score, with a per-token KL penalty (InstructGPT, section 3.5; Ziegler et al. 2019)."""

    # Not a TrainingArguments: PPO's own loop would ignore most of those fields.
    parent: str = key("", "folder or Hub id of the model that the policy starts from", group="Networks", path=True)
    reference: str | None = key(
        None,
        "model that the KL penalty keeps the policy near; default: the parent (a later round may name SFT)",
        path=True,
    )
    chat_template: str | None = key(
        None, "chat template: a file, its text, `chatml` or `plain`; default: the parent's, which must have one"
    )
    roles: Literal["separate", "shared_trunk", "adapters"] = key(
        "separate",
        "separate: policy, reference and value are networks of their own (Stiennon et al. 2020); shared_trunk: a value "
        "head on the policy (Ziegler et al. 2019); adapters: LoRA for policy and value on one frozen base, the "
        "reference is the base",
    )
    lora: LoraOptions | None = key(None, "size of the adapters, for roles: adapters")
    quantization: Literal["4bit", "8bit"] | None = key(None, "the frozen base of roles: adapters in 4 or 8 bit")
    offload: Literal["none", "frozen", "all"] = key(
        "none",
        "what lies in the CPU's memory while nothing needs it; frozen: reference and reward models, outside of measuring and "
        "scoring; all: Adam's moments too, outside of the update",
    )
    value_init: Literal["reward", "policy"] | None = key(
        None,
        "value network from the reward model (Stiennon et al. 2020) or the policy's weights with a zero head (Ziegler "
        "et al. 2019); default: reward where the networks are separate or the reward is an adapter, else policy",
    )

    reward: list[RewardSource] = key(
        [], "what scores a response: models, functions, or a weighted list of both", group="Reward"
    )
    ensemble: Literal["sum", "mean", "lower"] = key(
        "sum",
        "several reward models: parts of a weighted sum; or opinions, of which the mean counts, or the mean less "
        "ensemble_penalty standard deviations",
    )
    ensemble_penalty: float = key(
        1.0, "ensemble: lower: standard deviations between the models that are taken off", 0, 100
    )
    scale_scores: Literal["none", "running"] = key("none", "running: scores are divided by their running deviation")
    score_clip: float | None = key(None, "scores (after scaling) are clipped to plus and minus this", 1e-9, 1e9)
    score_position: Literal["last", "after"] = key(
        "last",
        "the score stands at the last response token (Ziegler et al. 2019), or one after it, where the reward model "
        "reads (Huang et al. 2024)",
    )
    missing_eos: Literal["none", "replace", "subtract"] = key("replace", "what a response without a stop token gets")
    missing_eos_score: float = key(-1.0, "replace: the score itself; subtract: its size is taken off", -1e9, 1e9)

    total_rollouts: int = key(100, "rollouts; episodes are this times prompts_per_rollout", 1, 1e9, group="Rollouts")
    prompts_per_rollout: int = key(64, "prompts answered in one rollout, over all processes", 1, 1e7)
    max_prompt_tokens: int = key(512, "longer prompts are refused, or dropped with `long_prompts: drop`", 1, 1e7)
    long_prompts: Literal["error", "drop"] = key("error", "what to do with prompts over max_prompt_tokens")
    max_response_tokens: int = key(48, "sampled tokens at most, EOS included", 1, 1e6)
    temperature: float = key(
        1.0, "divides the logits everywhere: sampling, old, new and reference log-probabilities", 1e-3, 100
    )
    stop_tokens: list[str] = key([], "further tokens that end a response, beside EOS")
    generation_rows: int = key(64, "responses sampled together in one process", 1, 1e6)
    engine: Literal["local", "vllm"] = key(
        "local", "who samples the policy's responses: this process, or a vLLM server that holds its weights"
    )
    engine_url: str | None = key(None, "engine: vllm: the server's address, e.g. http://localhost:8000")
    engine_weights: str | None = key(
        None,
        "engine: vllm: folder that the server reads the policy's weights from, under this very path; default: engine/ in output_dir",
        path=True,
    )
    engine_wait: float = key(
        600.0, "engine: vllm: seconds to wait for a server that fails in between; then the run ends", 0, 1e6
    )

    kl_coef: float = key(
        0.05,
        "beta of the KL penalty to the reference (Stiennon et al. 2020, Huang et al. 2024: 0.05; InstructGPT: 0.02)",
        0,
        1e6,
        group="KL penalty",
    )
    kl_estimator: Literal["k1", "k2"] = key(
        "k1",
        "k1: in the per-token reward (InstructGPT, Ziegler et al. 2019); k2: as a loss beside the policy's",
    )
    kl_control: Literal["fixed", "adaptive"] = key("fixed", "adaptive: kl_coef follows kl_target (Ziegler et al. 2019)")
    kl_target: float = key(6.0, "adaptive: nats per response", 1e-9, 1e9)
    kl_horizon: float = key(10_000, "adaptive: episodes over which kl_coef may change by a fifth", 1, 1e15)

    minibatches: int = key(4, "optimizer steps of each network in one epoch over a rollout", 1, 1e6, group="PPO update")
    ppo_epochs: int = key(
        4, "epochs over a rollout (Stiennon et al. 2020, Huang et al. 2024: 4; InstructGPT: 1)", 1, 1000
    )
    gamma: float = key(1.0, "discount per token", 0, 1)
    gae_lambda: float = key(0.95, "lambda of generalized advantage estimation", 0, 1)
    clip_range: float = key(0.2, "policy ratio clip", 1e-6, 100)
    value_clip_range: float = key(0.2, "value clip around the old values", 1e-6, 1e9)
    vf_coef: float = key(0.1, "factor of the value loss", 0, 1e6)
    whiten_rewards: bool = key(
        False,
        "KL-shaped rewards to variance 1, their mean kept (Ziegler et al. 2019: on; Huang et al. 2024: off)",
    )
    whiten_advantages: bool = key(True, "advantages to mean 0 and variance 1 over all the rollout's tokens")
    max_update_kl: float | None = key(
        None,
        "no further epoch on a rollout once an epoch's KL from the old policy exceeds this, nats per token",
        0,
        1e9,
    )
    value_warmup_rollouts: int = key(0, "first rollouts that train the value network alone", 0, 1e9)
    micro_batch_tokens: int = key(4096, "tokens in one forward pass with gradients, of one process", 1, 1e9)
    gradient_checkpointing: bool = key(
        False, "recompute the policy's and the value network's activations in the backward pass"
    )

    learning_rate: float = key(1e-5, "policy's peak learning rate", 0, 10, group="Optimization")
    value_learning_rate: float | None = key(None, "value network's; default: learning_rate", 0, 10)
    lr_schedule: Schedule = key("linear", "linear: to 0 at the last rollout")
    value_lr_schedule: Schedule | None = key(None, "value network's; default: lr_schedule")
    warmup_rollouts: int = key(0, "rollouts of linear warm-up", 0, 1e9)
    warmup_from: float = key(0.0, "share of the peak that the warm-up starts from (InstructGPT: 0.1)", 0, 1)
    adam_beta2: float = key(0.95, "Adam's second beta (InstructGPT: 0.95)", 0, 0.99999)
    adam_epsilon: float = key(1e-5, "Adam's epsilon (Ziegler et al. 2019, Huang et al. 2024: 1e-5)", 0, 1)
    max_grad_norm: float = key(1.0, "clip of each network's gradient norm", 1e-12, 1e9)
    ema_decay: float | None = key(
        None, "moving average of the policy, one step per rollout, saved in ema/ (InstructGPT: 0.992)", 0, 0.999999
    )

    ptx_coef: float = key(
        0.0,
        "factor of the language-modelling loss beside PPO's (InstructGPT's gamma: 27.8), a mean over its tokens",
        0,
        1e6,
        group="Pretraining mix (PPO-ptx)",
    )
    ptx_datasets: list[DatasetEntry] = key([], "documents for ptx_coef")
    ptx_ratio: float = key(8.0, "blocks of documents for each prompt of a minibatch (InstructGPT: 8)", 1e-3, 1e4)
    ptx_block_tokens: int = key(256, "tokens of one such block", 8, 1e7)

    eval_datasets: list[DatasetEntry] = key(
        [], "held-out prompts; default: held_out_fraction of datasets", group="Evaluation"
    )
    judges: list[str] = key(
        [], "Python judges (module:function) that evaluations and the report ask, never the training"
    )
    eval_rollouts: int | None = key(
        None, "rollouts between two evaluations on held-out prompts; default: only at the end", 1, 1e9
    )
    eval_prompts: int = key(64, "held-out prompts answered at an evaluation", 1, 1e6)
    best_metric: str | None = key(
        None, "evaluation metric whose best rollout is kept (score, a judge's name, score_<part>); default: the last"
    )
    patience: int | None = key(None, "evaluations without a new best_metric before the run ends", 1, 1e6)
    stop_kl: float | None = key(
        None, "an evaluation at more than this KL from the reference, nats per response, ends the run", 0, 1e9
    )

    logging_steps: int = key(1, "rollouts between two logged lines", 1, 1e9)
    save_steps: int = key(10, "rollouts between two resumable checkpoints", 1, 1e9)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parent:
            raise ValueError("parent is missing; name the SFT model's folder or Hub id")
        if not self.reward:
            raise ValueError("reward is missing; give a reward model's folder or a `function: module:name`")
        if self.reference and self.roles == "adapters":
            raise ValueError(
                "reference: with `roles: adapters` the reference is the base; drop it, or choose other roles"
            )
        if self.prompts_per_rollout % self.minibatches:
            raise ValueError(
                f"minibatches ({self.minibatches}) must divide prompts_per_rollout ({self.prompts_per_rollout})"
            )
        if bool(self.ptx_coef) != bool(self.ptx_datasets):
            raise ValueError("ptx_coef and ptx_datasets go together: a factor above 0 and documents to train on")
        self._check_networks()
        self._check_engine()
        self._check_evaluation()

    def _check_networks(self) -> None:
        models = [source for source in self.reward if source.model]
        if self.ensemble != "sum" and (len(models) < 2 or len({source.weight for source in models}) > 1):
            raise ValueError(
                f"ensemble: {self.ensemble} needs two reward models or more, of one weight; train them with "
                "`rlhf run RECIPE --to reward --reward-seeds 3`"
            )
        if (self.roles == "adapters") != (self.lora is not None):
            raise ValueError("`roles: adapters` and `lora:` go together, e.g. lora: {r: 16, alpha: 32}")
        if self.quantization and self.roles != "adapters":
            raise ValueError("quantization needs `roles: adapters`; 4-/8-bit weights are frozen")
        if self.value_init == "reward" and not models:
            raise ValueError("value_init: reward needs a reward model; with functions only, say `value_init: policy`")
        if self.value_init == "reward" and self.roles == "shared_trunk":
            raise ValueError(
                "value_init: reward needs a value network of its own; shared_trunk starts from a zero head"
            )
        if self.value_warmup_rollouts >= self.total_rollouts:
            raise ValueError("value_warmup_rollouts leaves no rollout for the policy; raise total_rollouts")

    def _check_engine(self) -> None:
        if self.engine == "local":
            return
        if self.engine_url is None:
            raise ValueError("engine: vllm needs the server's address, e.g. engine_url: http://localhost:8000")
        check_engine(self.engine_url, self.temperature)

    def _check_evaluation(self) -> None:
        if (self.best_metric or self.stop_kl is not None) and self.eval_rollouts is None:
            raise ValueError("best_metric and stop_kl look at evaluations; say `eval_rollouts:`")
        if self.patience and not self.best_metric:
            raise ValueError("patience counts evaluations without a new best; say `best_metric:`")
