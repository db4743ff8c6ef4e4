"""One dataclass per stage: what a recipe may say, with types, defaults and ranges, checked before anything is loaded.

A recipe is YAML. `load` composes it with its marks, so that a wrong key, type or value is answered with its line;
flags of the same names (parsed by TRL's TrlParser) then override it.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pipeline.errors import UserError, shorten

import yaml

Precision = Literal["fp32", "bf16", "auto"]
TRACKERS = ("wandb", "tensorboard", "trackio", "none")


def key(default: Any, help: str) -> Any:
    """A dataclass field with its help text (shown by `--help`)."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """One dataset of a recipe: a file or card folder under `--data-root`, or a dataset id on the Hub."""

    path: str | None = key(None, "file (.jsonl, .jsonl.gz, .parquet, .txt) or folder with a dataset card")
    hub: str | None = key(None, "dataset id on the Hub, instead of path")
    name: str | None = key(None, "name in reports; default: the last part of path or hub")
    subset: str | None = key(None, "configuration name of a Hub dataset")
    split: str = key("train", "split of a card folder or Hub dataset")
    revision: str | None = key(None, "revision of a Hub dataset")
    columns: dict[str, str] | None = key(None, "column map: our name → the file's name")
    weight: float | None = key(None, "share of the mixture; without weights every row is seen once an epoch")
    max_rows: int | None = key(None, "use only the first rows, for short runs")
    document_separator: str | None = key(None, "text that separates the documents of a .txt file")

    response_suffix: str | None = key(None, "literal end mark that the file's responses carry, taken off and counted")

    ranges: ClassVar[dict[str, tuple[float, float]]] = {"weight": (1e-9, 1e9), "max_rows": (1, 1e12)}


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """LoRA adapters (Hu et al. 2021) on the linear layers; the finished run leaves adapter and merged weights."""

    r: int = key(16, "rank")
    alpha: int = key(32, "scale: alpha / r")
    dropout: float = key(0.0, "dropout on the adapter's input")
    target_modules: list[str] | None = key(None, "module names; default: all linear layers but the head")

    ranges: ClassVar[dict[str, tuple[float, float]]] = {"r": (1, 4096), "alpha": (1, 65536), "dropout": (0, 0.99)}


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """A byte-level BPE trained on the corpora; special tokens are pad, eos and one per role, all distinct."""

    vocab_size: int = key(1024, "size, special tokens included")

    ranges: ClassVar[dict[str, tuple[float, float]]] = {"vocab_size": (270, 1_000_000)}


@dataclass(frozen=True, kw_only=True)
class RewardSource:
    """One part of a score: a reward model's folder or a Python function, times a weight."""

    model: str | None = key(None, "folder or Hub id of a reward model")
    function: str | None = key(None, "module:function, (prompts, responses, rows) -> list of floats")
    weight: float = key(1.0, "factor of this part in the sum")

    def __post_init__(self) -> None:
        if (self.model is None) == (self.function is None):
            raise ValueError("a reward names exactly one of `model:` and `function:`")

    def __str__(self) -> str:
        """The flag that gives this source."""
        return str(self.model or self.function) + (f"*{self.weight:g}" if self.weight != 1.0 else "")


@dataclass(frozen=True, kw_only=True)
class StageArguments:
    """What every stage's recipe may say."""

    output_dir: str = key("", "folder that the stage fills; a folder of another finished run is refused")
    datasets: list[DatasetEntry] = key([], "the stage's data")
    data_root: str = key(".", "what relative paths of datasets are relative to")
    seed: int = key(0, "seed of everything random")
    precision: Precision = key("auto", "bf16 autocast over fp32 weights, or fp32; auto: bf16 where the hardware has it")
    held_out_fraction: float = key(0.02, "share of the prompts (or documents) kept for evaluation, by hash")
    report_to: list[str] = key([], f"trackers: {', '.join(TRACKERS)}")
    run_name: str | None = key(None, "name of the run in trackers; default: the output folder's name")
    logging_steps: int = key(10, "steps (rollouts in PPO) between two logged lines")
    save_steps: int = key(100, "steps (rollouts in PPO) between two resumable checkpoints")
    keep_checkpoints: int = key(1, "newest resumable checkpoints kept while the stage runs")
    threads: int | None = key(None, "CPU threads of each process; default: what the launcher set")
    quiet: bool = key(False, "no progress bar; warnings and the summary line only")

    @property
    def trackers(self) -> list[str]:
        """`report_to` without `none`, by which a flag takes a recipe's trackers away."""
        return [tracker for tracker in self.report_to if tracker != "none"]

    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "held_out_fraction": (0, 0.9),
        "logging_steps": (1, 1e9),
        "save_steps": (1, 1e9),
        "keep_checkpoints": (1, 1e6),
        "threads": (1, 4096),
        "seed": (0, 2**32 - 1),
    }

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir is missing; say where the stage shall write")
        if not self.datasets:
            raise ValueError("datasets is missing or empty; name at least one `- path:` or `- hub:`")
        for tracker in self.report_to:
            if tracker not in TRACKERS or (tracker == "none" and len(self.report_to) > 1):
                raise ValueError(f"report_to: unknown tracker {tracker!r}; known: {', '.join(TRACKERS)}")
        if self.logging_steps and self.save_steps % self.logging_steps:
            raise ValueError(
                f"save_steps ({self.save_steps}) must be a multiple of logging_steps ({self.logging_steps}), "
                "so that a resumed run logs the same lines"
            )


@dataclass(frozen=True, kw_only=True)
class TrainerArguments(StageArguments):
    """What the stages that a Trainer runs share: pretrain, SFT, reward."""

    learning_rate: float = key(1e-4, "peak learning rate")
    lr_schedule: Literal["cosine", "linear", "constant"] = key("cosine", "shape after the warm-up")
    min_lr_fraction: float = key(0.1, "cosine ends at this share of the peak (I22: 0.1)")
    warmup_steps: int = key(0, "steps of linear warm-up from 0")
    weight_decay: float = key(0.0, "AdamW's decoupled weight decay, not on biases and norms")
    adam_beta2: float = key(0.95, "Adam's second beta (I22: 0.95)")
    max_grad_norm: float = key(1.0, "clip of the gradient's global norm")
    optimizer: Literal["adamw", "adamw_8bit"] = key("adamw", "adamw_8bit: bitsandbytes' 8-bit states")
    epochs: float = key(1.0, "passes over the training data")
    max_steps: int | None = key(None, "optimizer steps, instead of epochs")
    examples_per_step: int = key(32, "examples in one optimizer step, over all processes")
    examples_per_device: int = key(8, "examples in one forward pass of one process")
    eval_examples_per_device: int = key(16, "the same in evaluations")
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass")
    eval_steps: int | None = key(None, "steps between two evaluations; default: only at the end")
    trainer_options: dict[str, Any] | None = key(None, "further TrainingArguments by their own names")

    ranges: ClassVar[dict[str, tuple[float, float]]] = StageArguments.ranges | {
        "learning_rate": (0, 10),
        "min_lr_fraction": (0, 1),
        "warmup_steps": (0, 1e9),
        "weight_decay": (0, 10),
        "adam_beta2": (0, 0.99999),
        "max_grad_norm": (1e-12, 1e9),
        "epochs": (1e-6, 1e5),
        "max_steps": (1, 1e9),
        "examples_per_step": (1, 1e7),
        "examples_per_device": (1, 1e6),
        "eval_examples_per_device": (1, 1e6),
        "eval_steps": (1, 1e9),
    }


@dataclass(frozen=True, kw_only=True)
class PretrainArguments(TrainerArguments):
    """Causal language model from nothing, or further training of a checkpoint, on plain text."""

    parent: str | None = key(None, "checkpoint to continue from; without one the model starts from nothing")
    config_class: str = key("LlamaConfig", "transformers config class of a new model, e.g. LlamaConfig, GPT2Config")
    model_config: dict[str, Any] = key({}, "sizes of a new model, by the config class's own names")
    tokenizer: str | None = key(None, "existing tokenizer (folder or Hub id) instead of training one")
    train_tokenizer: TokenizerOptions | None = key(None, "train a byte-level BPE on the corpora")
    block_tokens: int = key(256, "tokens in one packed block; documents are kept apart inside it")
    learning_rate: float = key(1e-3, "peak learning rate")
    epochs: float = key(1.0, "passes over the mixture")

    ranges: ClassVar[dict[str, tuple[float, float]]] = TrainerArguments.ranges | {"block_tokens": (8, 1e7)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parent is None and self.tokenizer is None and self.train_tokenizer is None:
            raise ValueError("a new model needs `train_tokenizer:` (trains one) or `tokenizer:` (takes one)")
        if self.parent is not None and (self.train_tokenizer is not None or self.tokenizer is not None):
            raise ValueError(
                "a continued checkpoint keeps its tokenizer; drop `tokenizer:`/`train_tokenizer:` or `parent:`"
            )


@dataclass(frozen=True, kw_only=True)
class AdapterArguments(TrainerArguments):
    """What SFT and reward share: a parent, and the memory savers."""

    parent: str = key("", "folder or Hub id of the model to start from")
    max_tokens: int = key(1024, "longest prompt and response together; longer examples are counted and dropped")
    lora: LoraOptions | None = key(None, "train LoRA adapters instead of all weights")
    quantization: Literal["4bit", "8bit"] | None = key(None, "load the frozen base in 4 or 8 bit (needs lora)")

    ranges: ClassVar[dict[str, tuple[float, float]]] = TrainerArguments.ranges | {"max_tokens": (8, 1e7)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parent:
            raise ValueError("parent is missing; name the folder or Hub id of the model to start from")
        if self.quantization and self.lora is None:
            raise ValueError("quantization needs `lora:`; 4-/8-bit weights are frozen")


@dataclass(frozen=True, kw_only=True)
class SFTArguments(AdapterArguments):
    """Supervised fine-tuning on demonstrations, loss on the responses only."""

    packing: bool = key(True, "pack several examples into one row of max_tokens, kept apart by position")
    loss_on: Literal["responses", "all"] = key("responses", "all: prompts too (as Huang et al. 2024)")
    best_metric: Literal["none", "loss", "token_accuracy", "score"] = key(
        "none", "evaluation metric that picks the kept checkpoint; none: the last"
    )
    score: list[RewardSource] = key([], "reward of sampled held-out responses, for best_metric: score")
    score_prompts: int = key(64, "held-out prompts answered greedily for best_metric: score")
    max_response_tokens: int = key(64, "longest sampled response for best_metric: score")
    learning_rate: float = key(1e-4, "peak learning rate (I22: 9.65e-6 for 175B-class bases)")

    ranges: ClassVar[dict[str, tuple[float, float]]] = AdapterArguments.ranges | {
        "score_prompts": (1, 1e6),
        "max_response_tokens": (1, 1e6),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best_metric != "none" and self.eval_steps is None:
            raise ValueError("best_metric needs `eval_steps:`, the steps between two evaluations")
        if (self.best_metric == "score") != bool(self.score):
            raise ValueError("`best_metric: score` and `score:` (a reward model or function) go together")
        if self.best_metric != "none" and self.save_steps != self.eval_steps:
            raise ValueError("with best_metric, save_steps must equal eval_steps: only a saved step can be kept")


@dataclass(frozen=True, kw_only=True)
class RewardArguments(AdapterArguments):
    """Reward model from comparisons; every ranking is one example, all its pairs in one step (I22, section 3.5)."""

    center_on: list[DatasetEntry] = key([], "demonstrations whose mean score becomes 0")
    held_out_labelers: list[str] = key([], "labelers kept out of training, reported apart")
    labeler_folds: int | None = key(None, "K-fold over labelers (I22, 5 groups): labelers fall into so many groups …")
    labeler_fold: int = key(0, "… and this one is kept out; `rlhf run --labeler-folds K` trains all")
    ties: Literal["drop", "half", "margin"] = key(
        "drop",
        "pairs of equal rank: drop them (I22), train towards 0.5, or give ties a probability of their own (Rao and "
        "Kupper 1967)",
    )
    tie_margin: float = key(0.5, "ties: margin: how far apart scores must lie for even odds on being told apart")
    confidence: Literal["ignore", "target", "weight"] = key(
        "ignore", "the records' `confidence`: probability that the preference is right, or weight of the record's loss"
    )
    label_smoothing: float = key(0.0, "probability that a preference was noted the wrong way round")
    labeler_weights: dict[str, float] = key({}, "weight of a labeler's records in the loss; 1 where none is named")
    group_by_length: bool = key(True, "batches of rankings of like length: less padding")
    truth: str | None = key(None, "module:function that knows the noiseless preference, for the noise ceiling")
    problems: Literal["drop", "error"] = key("drop", "records that cannot be trained on: drop and list, or refuse")
    head_std: float | None = key(None, "standard deviation of the new head; default 1/sqrt(hidden + 1) (S20)")
    unit_variance_samples: int | None = key(
        None, "scale scores to variance 1 over so many answers sampled from the parent (Z19: 256)"
    )
    disable_dropout: bool = key(True, "no dropout while training (A16)")
    learning_rate: float = key(9e-6, "peak learning rate (I22: 9e-6)")
    held_out_fraction: float = key(0.1, "share of the prompts kept for evaluation, by hash")

    ranges: ClassVar[dict[str, tuple[float, float]]] = AdapterArguments.ranges | {
        "head_std": (0, 10),
        "labeler_folds": (2, 1000),
        "labeler_fold": (0, 999),
        "tie_margin": (1e-3, 100),
        "label_smoothing": (0, 0.499),
        "unit_variance_samples": (16, 1_000_000),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labeler_folds is not None:
            if self.held_out_labelers:
                raise ValueError("labeler_folds chooses the held-out labelers; drop held_out_labelers, or the folds")
            if self.labeler_fold >= self.labeler_folds:
                raise ValueError(f"labeler_fold counts from 0 to labeler_folds - 1, {self.labeler_folds - 1}")
        for name, weight in self.labeler_weights.items():
            if not 0 < weight < 1e6:
                raise ValueError(f"labeler_weights: {name}: {weight} must lie above 0 and below a million")


@dataclass(frozen=True, kw_only=True)
class PPOArguments(StageArguments):
    """PPO from the SFT policy against a score, with a per-token KL penalty (I22, section 3.5; Ziegler et al. 2019).

    Not a TrainingArguments: its loop would ignore most of those fields.
    """

    parent: str = key("", "folder or Hub id of the SFT model: policy and reference")
    reward: list[RewardSource] = key([], "what scores a response: models, functions, or a weighted list of both")
    ensemble: Literal["sum", "mean", "lower"] = key(
        "sum",
        "several reward models: parts of a weighted sum; or opinions, of which the mean counts, or the mean less "
        "ensemble_penalty standard deviations",
    )
    ensemble_penalty: float = key(1.0, "ensemble: lower: standard deviations between the models that are taken off")
    roles: Literal["separate", "shared_trunk", "adapters"] = key(
        "separate",
        "separate: policy, reference and value are networks of their own (S20); shared_trunk: a value head on the policy "
        "(Z19); adapters: LoRA for policy and value on one frozen base, the reference is the base",
    )
    lora: LoraOptions | None = key(None, "size of the adapters, for roles: adapters")
    quantization: Literal["4bit", "8bit"] | None = key(None, "the frozen base of roles: adapters in 4 or 8 bit")
    value_init: Literal["reward", "policy"] | None = key(
        None,
        "value network from the reward model (S20) or the policy's trunk with a zero head (Z19); default: reward where "
        "the roles are separate or the reward is an adapter, else policy",
    )
    eval_datasets: list[DatasetEntry] = key([], "held-out prompts; default: held_out_fraction of datasets")
    judges: list[str] = key(
        [], "Python judges (module:function) that evaluations and the report ask, never the training"
    )
    total_rollouts: int = key(100, "rollouts; episodes are this times prompts_per_rollout")
    prompts_per_rollout: int = key(64, "prompts answered in one rollout, over all processes")
    minibatches: int = key(4, "optimizer steps of each network in one epoch over a rollout")
    ppo_epochs: int = key(4, "epochs over a rollout (S20, N+: 4; I22: 1)")
    max_prompt_tokens: int = key(512, "longer prompts are refused, or dropped with `long_prompts: drop`")
    long_prompts: Literal["error", "drop"] = key("error", "what to do with prompts over max_prompt_tokens")
    max_response_tokens: int = key(48, "sampled tokens at most, EOS included")
    temperature: float = key(1.0, "divides the logits everywhere: sampling, old, new and reference (A18)")
    stop_tokens: list[str] = key([], "further tokens that end a response, beside EOS")
    kl_coef: float = key(0.05, "beta of the KL penalty to the reference (S20, N+: 0.05; I22: 0.02)")
    kl_estimator: Literal["k1", "k2", "k3"] = key(
        "k1", "k1: in the per-token reward (I22, Z19); k2: as a loss beside the policy's; k3 is refused (A21)"
    )
    kl_control: Literal["fixed", "adaptive"] = key("fixed", "adaptive: kl_coef follows kl_target (Z19, A22)")
    kl_target: float = key(6.0, "adaptive: nats a response")
    kl_horizon: float = key(10_000, "adaptive: episodes over which kl_coef may change by a fifth")
    score_position: Literal["last", "after"] = key(
        "last",
        "the score stands at the last response token (Z19), or one after it, where the reward model reads (N+; A23)",
    )
    scale_scores: Literal["none", "running"] = key("none", "running: scores are divided by their running deviation")
    score_clip: float | None = key(None, "scores (after scaling) are clipped to plus and minus this")
    whiten_rewards: bool = key(False, "KL-shaped rewards to variance 1, their mean kept (Z19: on, N+: off; A26)")
    whiten_advantages: bool = key(True, "advantages to mean 0 and variance 1 over all the rollout's tokens")
    missing_eos: Literal["none", "replace", "subtract"] = key(
        "replace", "what a response without a stop token gets (A20)"
    )
    missing_eos_score: float = key(-1.0, "replace: the score itself; subtract: its size is taken off")
    gamma: float = key(1.0, "discount per token")
    gae_lambda: float = key(0.95, "GAE's lambda")
    clip_range: float = key(0.2, "policy ratio clip")
    value_clip_range: float = key(0.2, "value clip around the old values")
    vf_coef: float = key(0.1, "factor of the value loss")
    max_update_kl: float | None = key(
        None, "no further epoch on a rollout once an epoch's KL from the old policy exceeds this, nats a token"
    )
    value_warmup_rollouts: int = key(0, "first rollouts that train the value network alone")
    ptx_coef: float = key(
        0.0, "factor of the language-modelling loss beside PPO's (I22's gamma: 27.8), a mean over its tokens"
    )
    ptx_datasets: list[DatasetEntry] = key([], "documents for ptx_coef")
    ptx_ratio: float = key(8.0, "blocks of documents for each prompt of a minibatch (I22: 8)")
    ptx_block_tokens: int = key(256, "tokens of one such block")
    ema_decay: float | None = key(None, "moving average of the policy, a rollout a step, saved in ema/ (I22: 0.992)")
    learning_rate: float = key(1e-5, "policy's peak learning rate")
    value_learning_rate: float | None = key(None, "value network's; default: learning_rate")
    lr_schedule: Literal["linear", "constant", "cosine"] = key("linear", "linear: to 0 at the last rollout (A31)")
    value_lr_schedule: Literal["linear", "constant", "cosine"] | None = key(
        None, "value network's; default: lr_schedule"
    )
    warmup_rollouts: int = key(0, "rollouts of linear warm-up")
    warmup_from: float = key(0.0, "share of the peak that the warm-up starts from (I22: 0.1)")
    adam_beta2: float = key(0.95, "Adam's second beta (I22)")
    adam_epsilon: float = key(1e-5, "Adam's epsilon (Z19, N+)")
    max_grad_norm: float = key(1.0, "clip of each network's gradient norm")
    micro_batch_tokens: int = key(4096, "tokens in one forward pass with gradients, of one process")
    generation_rows: int = key(64, "rows sampled together in one process")
    eval_rollouts: int | None = key(
        None, "rollouts between two evaluations on held-out prompts; default: only at the end"
    )
    eval_prompts: int = key(64, "held-out prompts answered at an evaluation")
    best_metric: str | None = key(
        None, "evaluation figure whose best rollout is kept (score, a judge's name, score_<part>); default: the last"
    )
    patience: int | None = key(None, "evaluations without a new best_metric before the run ends")
    stop_kl: float | None = key(
        None, "an evaluation at more than this KL from the reference, nats a response, ends the run"
    )
    logging_steps: int = key(1, "rollouts between two logged lines")
    save_steps: int = key(10, "rollouts between two resumable checkpoints")

    ranges: ClassVar[dict[str, tuple[float, float]]] = StageArguments.ranges | {
        "total_rollouts": (1, 1e9),
        "prompts_per_rollout": (1, 1e7),
        "minibatches": (1, 1e6),
        "ppo_epochs": (1, 1000),
        "max_prompt_tokens": (1, 1e7),
        "max_response_tokens": (1, 1e6),
        "temperature": (1e-3, 100),
        "kl_coef": (0, 1e6),
        "gamma": (0, 1),
        "gae_lambda": (0, 1),
        "clip_range": (1e-6, 100),
        "value_clip_range": (1e-6, 1e9),
        "vf_coef": (0, 1e6),
        "kl_target": (1e-9, 1e9),
        "kl_horizon": (1, 1e15),
        "score_clip": (1e-9, 1e9),
        "max_update_kl": (0, 1e9),
        "value_warmup_rollouts": (0, 1e9),
        "ptx_coef": (0, 1e6),
        "ptx_ratio": (1e-3, 1e4),
        "ptx_block_tokens": (8, 1e7),
        "ema_decay": (0, 0.999999),
        "warmup_from": (0, 1),
        "patience": (1, 1e6),
        "stop_kl": (0, 1e9),
        "learning_rate": (0, 10),
        "value_learning_rate": (0, 10),
        "warmup_rollouts": (0, 1e9),
        "adam_beta2": (0, 0.99999),
        "adam_epsilon": (0, 1),
        "ensemble_penalty": (0, 100),
        "max_grad_norm": (1e-12, 1e9),
        "micro_batch_tokens": (1, 1e9),
        "generation_rows": (1, 1e6),
        "eval_rollouts": (1, 1e9),
        "eval_prompts": (1, 1e6),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parent:
            raise ValueError("parent is missing; name the SFT model's folder or Hub id")
        if not self.reward:
            raise ValueError("reward is missing; give a reward model's folder or a `function: module:name`")
        models = [source for source in self.reward if source.model]
        if self.ensemble != "sum" and (len(models) < 2 or len({source.weight for source in models}) > 1):
            raise ValueError(
                f"ensemble: {self.ensemble} needs two reward models or more, of one weight; train them with "
                "`rlhf run RECIPE --to reward --reward-seeds 3`"
            )
        if self.minibatches and self.prompts_per_rollout % self.minibatches:
            raise ValueError(
                f"minibatches ({self.minibatches}) must divide prompts_per_rollout ({self.prompts_per_rollout})"
            )
        if self.kl_estimator == "k3":
            raise ValueError(
                "kl_estimator: k3 inside the reward has the gradient of another divergence: on a bandit it ends at a total "
                "variation of 0.41 from the optimum, then diverges; use k1 (in the reward) or k2 (as a loss)"
            )
        if bool(self.ptx_coef) != bool(self.ptx_datasets):
            raise ValueError("ptx_coef and ptx_datasets go together: a factor above 0 and documents to train on")
        if (self.roles == "adapters") != (self.lora is not None):
            raise ValueError("`roles: adapters` and `lora:` go together, e.g. lora: {r: 16, alpha: 32}")
        if self.quantization and self.roles != "adapters":
            raise ValueError("quantization needs `roles: adapters`; 4-/8-bit weights are frozen")
        if (self.best_metric or self.stop_kl is not None) and self.eval_rollouts is None:
            raise ValueError("best_metric and stop_kl look at evaluations; say `eval_rollouts:`")
        if self.patience and not self.best_metric:
            raise ValueError("patience counts evaluations without a new best; say `best_metric:`")
        if self.value_warmup_rollouts >= self.total_rollouts:
            raise ValueError("value_warmup_rollouts leaves no rollout for the policy; raise total_rollouts")
        if self.value_init == "reward" and not any(source.model for source in self.reward):
            raise ValueError("value_init: reward needs a reward model; with functions only, say `value_init: policy`")
        if self.value_init == "reward" and self.roles == "shared_trunk":
            raise ValueError(
                "value_init: reward needs a value network of its own; shared_trunk starts from a zero head"
            )


STAGES: dict[str, type[StageArguments]] = {
    "pretrain": PretrainArguments,
    "sft": SFTArguments,
    "reward": RewardArguments,
    "ppo": PPOArguments,
}
KINDS = {"pretrain": "document", "sft": "demonstration", "reward": "ranking", "ppo": "prompt"}  # of each stage's rows

Arguments = TypeVar("Arguments", bound=StageArguments)


def recipe_stages(folder: Path) -> list[str]:
    """The stages that a recipe folder has, in order."""
    if not folder.is_dir():
        raise UserError(f"no recipe folder {str(folder)!r}; see recipes/ for examples")
    stages = [name for name in STAGES if (folder / f"{name}.yaml").is_file()]
    if not stages:
        raise UserError(f"{str(folder)!r} holds none of {', '.join(f'{name}.yaml' for name in STAGES)}")
    return stages


def load(stage: type[Arguments], argv: Sequence[str]) -> Arguments:
    """The stage's arguments from `--config FILE` and flags.

    Raises:
        UserError: with the recipe's line, or the flag, of what is wrong.
    """
    argv = list(argv)
    path = None
    if "--config" in argv:
        position = argv.index("--config")
        if position + 1 == len(argv):
            raise UserError("--config needs a file; e.g. --config recipes/demo/sft.yaml")
        path = Path(argv[position + 1])
        del argv[position : position + 2]
    values, lines = read_recipe(path, stage) if path else ({}, {})
    parsed = _parse_flags(stage, values, argv)
    for name, (low, high) in stage.ranges.items():
        value = getattr(parsed, name)
        if value is not None and not low <= value <= high:
            message = f"{name}: {value} is out of range; it must lie between {low:g} and {high:g}"
            if name in lines and values.get(name) == value:
                raise UserError(message, file=path, line=lines[name])
            raise UserError(message)
    return parsed


def _parse_flags(stage: type[Arguments], values: dict[str, Any], argv: list[str]) -> Arguments:
    from trl import TrlParser  # heavy, and only needed when a stage starts

    class Parser(TrlParser):
        def error(self, message: str) -> typing.NoReturn:
            raise UserError(f"command line: {message}; `--help` lists the keys")

    # Values of a recipe arrive checked and built; the parser must not see their types, only the flags'.
    parser = Parser(dataclass_types=[typing.cast(Any, stage)], allow_abbrev=False)
    parser.set_defaults_with_config(**values)
    for action in parser._actions:
        if action.type is RewardSource:
            action.type = reward_source
    try:
        parsed, rest = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    except ValueError as error:  # a dataclass's own cross-field check
        raise UserError(str(error)) from error
    if rest:
        known = [f"--{field.name}" for field in dataclasses.fields(stage)]
        near = difflib.get_close_matches(rest[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else "`--help` lists the keys"
        raise UserError(f"command line: unknown flag {rest[0]!r}; {hint}")
    return parsed


def read_recipe(path: Path, stage: type[StageArguments]) -> tuple[dict[str, Any], dict[str, int]]:
    """A recipe's top-level values, checked and built into the stage's types, and the line of each key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError("no such recipe; see recipes/ for examples", file=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", file=path) from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"not valid YAML: {problem}", file=path, line=mark.line + 1 if mark else None) from error
    if node is None:
        raise UserError("the recipe is empty", file=path, line=1)
    reader = _RecipeReader(path)
    values = reader.mapping(node, stage)
    return values, {name.value: name.start_mark.line + 1 for name, _ in node.value}


class _RecipeReader:
    """Builds dataclass values from YAML nodes, refusing what a plain loader would let pass."""

    def __init__(self, path: Path):
        self.path = path

    def fail(self, node: yaml.Node, message: str) -> typing.NoReturn:
        raise UserError(message, file=self.path, line=node.start_mark.line + 1)

    def mapping(self, node: yaml.Node, cls: type) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, f"expected `key: value` lines for {cls.__name__}")
        hints = {f.name: typing.get_type_hints(cls)[f.name] for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = name_node.value
            if name in values:
                self.fail(name_node, f"key {name!r} stands twice; keep one")
            if name not in hints:
                near = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(hints))}"
                self.fail(name_node, f"unknown key {name!r}; {hint}")
            values[name] = self.value(value_node, hints[name], name)
        return values

    def value(self, node: yaml.Node, hint: Any, name: str) -> Any:
        origin, parts = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
                return None
            return self.value(node, next(part for part in parts if part is not type(None)), name)
        if dataclasses.is_dataclass(hint):
            if hint is RewardSource and isinstance(node, yaml.ScalarNode):
                return reward_source(self.scalar(node, str, name))
            return self.build(node, typing.cast(type, hint))
        if origin is list:
            items = node.value if isinstance(node, yaml.SequenceNode) else None
            if items is None and parts[0] is RewardSource:
                items = [node]  # `reward: runs/demo/reward` is the list's common case
            if items is None:
                self.fail(node, f"{name}: expected a list (`- …` lines or [a, b])")
            return [self.value(item, parts[0], name) for item in items]
        if origin is dict:
            if not isinstance(node, yaml.MappingNode):
                self.fail(node, f"{name}: expected `key: value` lines")
            seen: dict[str, Any] = {}
            for key_node, value_node in node.value:
                if key_node.value in seen:
                    self.fail(key_node, f"key {key_node.value!r} stands twice; keep one")
                seen[key_node.value] = self.value(value_node, parts[1], f"{name}.{key_node.value}")
            return seen
        if origin is Literal:
            value = self.scalar(node, str, name)
            if value not in parts:
                near = difflib.get_close_matches(value, parts, n=1)
                hint_text = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(map(str, parts))}"
                self.fail(node, f"{name}: {value!r} is not known; {hint_text}")
            return value
        if hint is Any:
            return _construct(node)
        return self.scalar(node, hint, name)

    def build(self, node: yaml.Node, cls: type) -> Any:
        values = self.mapping(node, cls)
        for field_name, (low, high) in getattr(cls, "ranges", {}).items():
            value = values.get(field_name)
            if value is not None and not low <= value <= high:
                self.fail(node, f"{field_name}: {value} is out of range; it must lie between {low:g} and {high:g}")
        try:
            return cls(**values)
        except ValueError as error:
            self.fail(node, str(error))

    def scalar(self, node: yaml.Node, hint: type, name: str) -> Any:
        value = _construct(node) if isinstance(node, yaml.ScalarNode) else node
        if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-5 as text
            try:
                value = float(value)
            except ValueError:
                self.fail(node, f"{name}: expected a number, got {shorten(value)}")
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if hint is float and value != value:
            self.fail(node, f"{name}: NaN is not a number to train with")
        if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
            value = node.value
        if type(value) is not hint:
            got = "a list or mapping" if isinstance(value, yaml.Node) else shorten(value)
            self.fail(node, f"{name}: expected {_TYPE_NAMES.get(hint, hint.__name__)}, got {got}")
        return value


_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _construct(node: yaml.Node) -> Any:
    return yaml.SafeLoader("").construct_object(node, deep=True)


def reward_source(text: str) -> RewardSource:
    """`module:function` names a function, anything else a model (a path may hold no colon); `*0.2` after it is its weight."""
    name, star, factor = text.rpartition("*")
    try:
        weight = float(factor) if star else 1.0
    except ValueError:
        name, weight = text, 1.0
    name = name or text
    if ":" in name and "/" not in name:
        return RewardSource(function=name, weight=weight)
    return RewardSource(model=name, weight=weight)


def as_dict(arguments: StageArguments) -> dict[str, Any]:
    """Plain data for lineage.json."""
    return dataclasses.asdict(arguments)
