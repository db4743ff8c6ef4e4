"""What the Trainer stages share: Trainer's settings from a recipe, sealed checkpoints, history, exact resume.

All ties to the insides of transformers' Trainer (5.23) and TRL's trainers (1.16) are in this file, in `sharded_trainer.py`, in
`RankingTrainer` of `pipeline/reward.py` and in `DemonstrationTrainer` of `pipeline/sft.py`; tests/training/test_trainer.py fails where a new
version breaks one of them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config.trainer import TrainerArguments
from pipeline.data.encoding import IGNORE
from pipeline.errors import UserError
from pipeline.models.lora import save_merged
from pipeline.models.precision import accelerator_type, device_plan
from pipeline.models.sharding import is_sharded, local, whole_state_dict
from pipeline.models.token_nll import token_nll
from pipeline.training import checkpoints, history
from pipeline.training.checkpoints import Manifest
from pipeline.training.json_files import NotAnObject, read_json_object, write_json
from pipeline.training.progress import Progress
from pipeline.training.run import Run
from pipeline.training.sharded_trainer import ShardedTrainer

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)
SCHEDULES = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}
# Fields of TrainingArguments, SFTConfig and RewardConfig that `trainer_options` may not set: a key of the stage sets
# them, exact resume or the check for divergence needs them as they are, or they have no effect on encoded rows.
SET_BY_THE_STAGE = {
    "output_dir", "seed", "report_to", "bf16", "fp16", "use_cpu", "optim", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "max_grad_norm", "weight_decay", "adam_beta2", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps", "logging_nan_inf_filter", "eval_steps",
    "eval_strategy", "save_steps", "save_strategy", "save_total_limit", "load_best_model_at_end", "metric_for_best_model",
    "remove_unused_columns", "packing", "max_length", "dataset_text_field", "completion_only_loss", "assistant_only_loss",
    "center_rewards_coefficient",  # our ranking loss has no such term: scores are centred after training
}  # fmt: skip
UNLOGGED = "unlogged.json"
SUMS_THAT_DIVERGE = ("loss", "grad_norm", "eval_loss", "eval_nll")


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
        if name not in fields:
            raise UserError(f"trainer_options: {name!r} is no field of {cls.__name__}; drop it")
        if name in SET_BY_THE_STAGE:
            raise UserError(f"trainer_options: {name!r} is set by a key of this stage, or has no effect in it; drop it")
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
        optim="adamw_8bit" if args.optimizer == "adamw_8bit" else "adamw_torch_fused",
        bf16=device_plan(accelerator_type(), args.precision).bf16,
        use_cpu=accelerator_type() == "cpu",
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
        disable_tqdm=True,  # progress is shown by StageCallback
        logging_nan_inf_filter=False,  # it would hide a loss that is not finite behind the mean of those before
        dataloader_pin_memory=accelerator_type() == "cuda",
    )
    try:
        return cls(**{**settings, **extra, **options})
    except (TypeError, ValueError) as error:
        raise UserError(f"trainer_options or precision: {error}") from error


class StageCallback(TrainerCallback):
    """Seals checkpoints, writes history.jsonl, shows progress, ends on a signal at a step's end or when training diverged."""

    def __init__(self, run: Run[Any], trainer: StageTrainer):
        self.run, self.trainer = run, trainer
        self.resumed_from: Path | None = None
        self.progress: Progress | None = None
        self.last_loss: dict[str, float] = {}
        self.last_logged = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.resumed_from is not None:
            self.trainer.restore_unlogged(self.resumed_from, self.run.processes.rank)
            best = Manifest.read(self.resumed_from).best  # by its name: the folder may have been moved since
            state.best_model_checkpoint = str(self.resumed_from.parent / best) if best else None
        self.last_logged = state.global_step
        self.trainer.restart_clock()
        self.progress = Progress(state.max_steps, self.run.name, self.run, done=state.global_step)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:  # resumed from the last step's checkpoint
            control.should_training_stop = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.progress is not None
        self.progress.update(self.last_loss)
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
        if not logs or "train_runtime" in logs:  # Trainer's summary of one start says nothing of the whole run
            return
        for name in SUMS_THAT_DIVERGE:
            if not math.isfinite(logs.get(name, 0.0)):
                self._raise_diverged(f"{name.removeprefix('eval_')} is {logs[name]}", state.global_step)
        if "loss" in logs:
            self.last_logged, self.last_loss = state.global_step, {"loss": logs["loss"]}
        if not self.run.is_main:
            return
        row = {key: value for key, value in logs.items() if key not in ("epoch", "num_tokens", "total_flos")}
        history.append(self.run.output.folder, {"step": state.global_step, **row})
        logger.info("%s step %d: %s", self.run.name, state.global_step, _short(row))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        output, processes = self.run.output, self.run.processes
        checkpoint = output.folder / f"checkpoint-{state.global_step}"
        unlogged = processes.gather(lambda: [self.trainer.unlogged()])  # and every rank's files are there
        losses_finite = all(math.isfinite(share["loss"]) for share in unlogged)
        if processes.any(not self.trainer.weights_are_finite()) or not losses_finite:
            if self.run.is_main:
                checkpoints.remove(checkpoint)
            what = "a weight" if losses_finite else "the loss"
            self._raise_diverged(f"{what} is not finite", state.global_step)
        if self.run.is_main:
            write_json(checkpoint / UNLOGGED, {"ranks": unlogged})
            best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
            output.seal(checkpoint, best=best.name if best else None)
            output.prune(self.run.args.keep_checkpoints, also=[best] if best else [])
        processes.barrier()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.progress is not None:
            self.progress.close()

    def _raise_diverged(self, what: str, step: int) -> None:
        steps = f"steps {self.last_logged + 1} to {step}" if step > self.last_logged + 1 else f"step {step}"
        raise UserError(
            f"{what} in {steps}: training diverged, and earlier checkpoints are as they were; lower "
            "learning_rate, raise warmup_steps or set `precision: fp32`, and start in a new output_dir"
        )


def _short(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )


class StageTrainer(ShardedTrainer):
    """Mixed in before a Trainer class: evaluation by `measure`, throughput beside every logged loss, exact resume.

    Overridden of transformers' Trainer: `evaluate`, `training_step`, `log`, `get_batch_samples`. Read and set of its
    private attributes: `_tr_loss` and `_globalstep_last_logged` (the loss summed since the last logged row); of TRL's
    trainers `_metrics` (lists of values since then, by "train" and "eval").
    """

    measure: Any  # () -> held-out metrics; every stage has its own
    control: Any
    accelerator: Any
    callback_handler: Any
    _tr_loss: Any
    _globalstep_last_logged: int
    _metrics: Any
    tokens_seen = 0
    _clock, _tokens_then, _flops_then = 0.0, 0, 0.0

    @property
    def eval_rows(self) -> int:
        """Rows of one evaluation forward pass in one process."""
        return int(self.args.per_device_eval_batch_size)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The stage's own held-out metrics (token-weighted, over all processes), under Trainer's names."""
        training = self.model.training
        self.model.eval()
        with self.accelerator.autocast():
            measured = self.measure()
        self.model.train(training)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in measured.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """No batch where no step is left: Trainer looks whether to stop only after a step."""
        if self.control.should_training_stop:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.tokens_seen += int(inputs["input_ids"].numel()) * self.args.world_size
        return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._throughput()
        trl = getattr(self, "_metrics", {"train": {}, "eval": {}})
        trl["train"].pop("num_tokens", None)  # TRL's counter restarts at a resume
        trl["eval"].clear()
        super().log(logs, start_time)  # type: ignore[misc]

    def restart_clock(self) -> None:
        self._clock, self._tokens_then, self._flops_then = time.perf_counter(), self.tokens_seen, self.state.total_flos

    def _throughput(self) -> dict[str, float]:
        """Tokens and FLOPs per second since the last logged row."""
        self.store_flos()  # type: ignore[attr-defined]
        seconds = max(time.perf_counter() - self._clock, 1e-9)
        tokens, flops = self.tokens_seen - self._tokens_then, self.state.total_flos - self._flops_then
        self.restart_clock()
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "model_flops_per_second": round(flops / seconds),
        }

    def unlogged(self) -> dict[str, Any]:
        """What this process has summed up since the last logged row: the first row after a resume holds it too."""
        metrics = getattr(self, "_metrics", {}).get("train", {})
        return {
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "metrics": {name: list(values) for name, values in metrics.items() if name != "num_tokens"},
        }

    def restore_unlogged(self, checkpoint: Path, rank: int) -> None:
        """Go on summing where the checkpoint was saved; another number of processes starts from the first one's sums."""
        try:
            ranks = read_json_object(checkpoint / UNLOGGED)["ranks"]
        except NotAnObject:  # sealed, so it was never written
            return
        saved: Mapping[str, Any] = ranks[rank] if rank < len(ranks) else ranks[0]
        self._tr_loss += saved["loss"]
        self._globalstep_last_logged = saved["last_logged"]
        for name, values in saved["metrics"].items():
            self._metrics["train"][name] = list(values)

    def weights_are_finite(self) -> bool:
        """Whether this process's trained weights are all finite; one read from the device."""
        trained = [local(p) for p in self.model.parameters() if p.requires_grad]
        trained = [tensor for tensor in trained if tensor.numel()]
        return not trained or bool(torch.stack([torch.isfinite(p).all() for p in trained]).all())


def prepare_trainer(trainer: Any, run: Run[Any]) -> None:
    """Give a trainer our callback instead of its printers, and fp32 weights to train."""
    from transformers.trainer_callback import PrinterCallback

    for parameter in trainer.model.parameters():  # TRL makes a quantised base's adapters (and head) bf16
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.stage_callback = StageCallback(run, trainer)
    trainer.add_callback(trainer.stage_callback)
    trainer.remove_callback(PrinterCallback)


def train(trainer: Any, run: Run[Any]) -> list[int]:
    """Train, resuming from the newest valid checkpoint; the weights to keep are then in `trainer.model`.

    Returns:
        the steps at which this run was resumed, over all its restarts.
    """
    checkpoint = run.output.resumable()
    resumed = run.begin(checkpoint)
    trainer.stage_callback.resumed_from = checkpoint
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    run.leave_if_interrupted()
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
    own_batches = (
        batch if counts else {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}
        for batch, counts in share_batches(batches, state)
    )
    nll, tokens, hits = token_nll(trainer.model, own_batches, state.device)
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


def save_trained(trainer: Any, tokenizer: Any, load_base: Callable[[], Any]) -> None:
    """The trained model to the output folder: all weights, or adapter and merged weights where adapters were trained.

    Adapters' frozen base is gone afterwards. Called by every rank.

    Args:
        load_base: loads the base in fp32, for merging; called on rank 0 alone.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel):
        save_whole(trainer, tokenizer)
        return
    adapter = None
    if is_sharded(model):
        adapter = whole_state_dict({name: p for name, p in model.named_parameters() if p.requires_grad})
    else:
        for parameter in model.parameters():
            if not parameter.requires_grad:  # so that the base, which is loaded again, is in memory once
                parameter.data = parameter.data.new_empty(0)
    if trainer.is_world_process_zero():
        save_merged(model, load_base(), tokenizer, Path(trainer.args.output_dir), adapter)
