"""What the Trainer stages share: Trainer's settings from a recipe, sealed checkpoints, history, exact resume."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.config.trainer import TrainerArguments
from pipeline.data.encoding import IGNORE
from pipeline.errors import UserError
from pipeline.models.precision import accelerator_type, device_plan
from pipeline.models.token_nll import token_nll
from pipeline.training import history
from pipeline.training.run import Run

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)
SCHEDULES = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}
OWNED = {
    "output_dir",
    "seed",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "bf16",
    "fp16",
    "report_to",
    "save_steps",
    "save_strategy",
    "logging_steps",
    "eval_steps",
    "eval_strategy",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "max_grad_norm",
    "weight_decay",
    "adam_beta2",
    "remove_unused_columns",
    "save_total_limit",
    "load_best_model_at_end",
    "metric_for_best_model",
    "packing",
    "max_length",
    "dataset_text_field",
    "completion_only_loss",
    "assistant_only_loss",
    "use_cpu",
    "center_rewards_coefficient",  # our ranking loss has no such term: scores are centred after training
}


def accumulation(args: TrainerArguments, processes: int) -> tuple[int, int]:
    """(examples of one forward pass, forward passes of one step) of each process.

    `examples_per_step` counts over all processes, so one process and eight make the same step.
    """
    if args.examples_per_step % processes:
        raise UserError(f"examples_per_step ({args.examples_per_step}) must be a multiple of the {processes} processes")
    share = args.examples_per_step // processes
    device = min(args.examples_per_device, share)
    if share % device:
        raise UserError(
            f"examples_per_device ({device}) must divide each process's share of examples_per_step "
            f"({args.examples_per_step} / {processes} = {share})"
        )
    return device, share // device


def training_arguments(cls: type[Any], run: Run[Any], best_metric: str | None = None, **extra: Any) -> Any:
    """TrainingArguments (or SFTConfig, RewardConfig) from the recipe."""
    args: TrainerArguments = run.args
    options = dict(args.trainer_options or {})
    fields = {field.name for field in dataclasses.fields(cls)}
    for name in options:
        if name not in fields or name in OWNED:
            why = (
                "is set by a key of this stage, or has no effect in it"
                if name in OWNED
                else f"is no field of {cls.__name__}"
            )
            raise UserError(f"trainer_options: {name!r} {why}; drop it")
    device, steps = accumulation(args, run.processes.count)
    settings = dict(
        output_dir=args.output_dir,
        seed=args.seed,
        data_seed=args.seed,
        per_device_train_batch_size=device,
        per_device_eval_batch_size=args.eval_examples_per_device,
        gradient_accumulation_steps=steps,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        learning_rate=args.learning_rate,
        lr_scheduler_type=SCHEDULES[args.lr_schedule],
        lr_scheduler_kwargs={"min_lr_rate": args.min_lr_fraction} if args.lr_schedule == "cosine" else {},
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        adam_beta2=args.adam_beta2,
        max_grad_norm=args.max_grad_norm,
        optim="adamw_8bit" if args.optimizer == "adamw_8bit" else "adamw_torch",
        bf16=device_plan(accelerator_type(), args.precision).bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=args.logging_steps,
        save_strategy="steps",
        save_steps=args.save_steps,
        save_total_limit=None,
        eval_strategy="steps" if args.eval_steps else "no",
        eval_steps=args.eval_steps,
        load_best_model_at_end=best_metric is not None,
        metric_for_best_model=best_metric,
        gradient_checkpointing=args.gradient_checkpointing,
        remove_unused_columns=False,
        report_to=args.trackers or "none",
        run_name=args.run_name or f"{Path(args.output_dir).parent.name}-{run.name}",
        disable_tqdm=not run.show_progress,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    try:
        return cls(**{**settings, **extra, **options})
    except (TypeError, ValueError) as error:
        raise UserError(f"trainer_options or precision: {error}") from error


class StageCallback(TrainerCallback):
    """Seals checkpoints, writes history.jsonl, ends on a signal at a step's end."""

    def __init__(self, run: Run[Any]):
        self.run = run
        self.clock = time.perf_counter()
        self.flops = 0.0
        self.tokens = 0
        self.count_tokens: Callable[[], int] = lambda: 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.clock, self.flops, self.tokens = time.perf_counter(), state.total_flos, self.count_tokens()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.run.interrupted():
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.run.is_main or not logs or "train_runtime" in logs:  # that one is no figure of ours (see design)
            return
        row = {key: value for key, value in logs.items() if key not in ("epoch", "num_tokens", "total_flos")}
        history.append(self.run.output.folder, {"step": state.global_step, **row})
        logger.info("%s step %d: %s", self.run.name, state.global_step, _short(row))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.run.processes.barrier()  # every rank's files are there before the manifest says so
        if self.run.is_main:
            output = self.run.output
            output.seal(output.folder / f"checkpoint-{state.global_step}")
            best = [Path(state.best_model_checkpoint)] if state.best_model_checkpoint else []
            output.prune(self.run.args.keep_checkpoints, also=best)
        self.run.processes.barrier()


def _short(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )


class StageTrainer:
    """Mixed in before a Trainer class: evaluation by `measure`, throughput beside every logged loss."""

    measure: Any  # () -> held-out figures; every stage has its own
    control: Any
    stage_callback: StageCallback
    tokens_seen = 0

    @property
    def eval_rows(self) -> int:
        """Rows of one evaluation forward pass in one process."""
        return int(self.args.per_device_eval_batch_size)  # type: ignore[attr-defined]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The stage's own held-out metrics (token-weighted, over all processes), under Trainer's names."""
        model = self.model  # type: ignore[attr-defined]
        training = model.training
        model.eval()
        with self.accelerator.autocast():  # type: ignore[attr-defined]
            found = self.measure()
        model.train(training)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in found.items()}
        self.log(dict(metrics))  # type: ignore[attr-defined]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[attr-defined]
        return metrics

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.tokens_seen += int(inputs["input_ids"].numel()) * self.args.world_size  # type: ignore[attr-defined]
        return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            callback = self.stage_callback
            self.store_flos()  # type: ignore[attr-defined]
            now, flops = time.perf_counter(), self.state.total_flos  # type: ignore[attr-defined]
            seconds = max(now - callback.clock, 1e-9)
            logs["tokens_per_second"] = round((self.tokens_seen - callback.tokens) / seconds, 1)
            logs["model_flops_per_second"] = round((flops - callback.flops) / seconds)
            callback.clock, callback.flops, callback.tokens = now, flops, self.tokens_seen
        super().log(logs, start_time)  # type: ignore[misc]


def prepare_trainer(trainer: Any, run: Run[Any]) -> None:
    """Give a trainer our callback instead of its printers, and fp32 weights to train (A35)."""
    from transformers.trainer_callback import PrinterCallback

    for parameter in trainer.model.parameters():  # TRL makes a quantised base's adapters (and head) bf16
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    callback = StageCallback(run)
    trainer.stage_callback = callback
    trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)


def train(trainer: Any, run: Run[Any]) -> list[int]:
    """Train, resuming from the newest valid checkpoint; the weights to keep are then in `trainer.model`.

    Returns:
        the steps at which this run was resumed, over all its restarts.
    """
    checkpoint = run.output.resumable()
    resumed = run.begin(checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if run.interrupted():
        run.leave_interrupted()
    return resumed


def share_batches(batches: Any, state: Any) -> Iterator[tuple[dict[str, Any], bool]]:
    """This process's share of evaluation batches, and whether each counts.

    Every process gets equally many, the last ones perhaps a batch that does not count: where weights are sharded, a
    forward pass is an exchange that all take part in.
    """
    for index, batch in enumerate(batches):
        if index % state.num_processes == state.process_index:
            yield batch, True
    missing = -len(batches) % state.num_processes
    if state.process_index >= state.num_processes - missing:
        yield next(iter(batches)), False


def measure_tokens(trainer: Any, rows: Any, rows_per_batch: int) -> tuple[float, int, int]:
    """`token_nll` of packed rows over all processes: each takes every n-th batch, the sums are added."""
    state = trainer.accelerator
    batches = DataLoader(rows, batch_size=rows_per_batch, collate_fn=trainer.data_collator)
    mine = (
        batch if counts else {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}
        for batch, counts in share_batches(batches, state)
    )
    nll, tokens, hits = token_nll(trainer.model, mine, state.device)
    total = torch.tensor([[nll, tokens, hits]], dtype=torch.float64)
    total = state.gather(total.to(state.device) if state.device.type != "mps" else total.float()).sum(0)
    return float(total[0]), int(total[1]), int(total[2])


def save_whole(trainer: Any, tokenizer: Any) -> None:
    """All weights to the output folder, from every backend: called by every rank, written by one."""
    folder = Path(trainer.args.output_dir)
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(folder)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle of what lineage.json says in the open
