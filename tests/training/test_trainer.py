"""What the Trainer stages add to transformers' Trainer: exact resume to the last step, divergence, progress, private ties."""

from __future__ import annotations

import inspect
import json
import logging
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.config.stages import STAGES
from pipeline.errors import UserError
from pipeline.models.loading import load_causal_lm
from pipeline.models.trials import fused_head_gives_the_loss
from pipeline.training import history, progress
from pipeline.training.identity import weights_sha256
from pipeline.training.progress import Progress, duration
from pipeline.training.sharded_trainer import ShardedTrainer
from pipeline.training.stage import launch
from pipeline.training.trainer import StageTrainer, save_trained

import datasets
import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer
from trl import RewardTrainer, SFTConfig, SFTTrainer
from trl.trainer import utils

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "two", "dogs", "ran", "past"]
RECIPE: dict[str, Any] = {
    "config_class": "LlamaConfig", "train_tokenizer": {"vocab_size": 280}, "block_tokens": 32, "precision": "fp32", "threads": 1,
    "model_config": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    },
    "examples_per_step": 4, "examples_per_device": 2, "learning_rate": 1e-3, "warmup_steps": 2, "max_steps": 10,
    "logging_steps": 2, "save_steps": 4, "eval_steps": 4, "held_out_fraction": 0.2,
}  # fmt: skip


def pretrain(folder: Path, **changes: Any) -> Path:
    """The pretraining stage in this process; returns its output folder."""
    from pipeline import pretrain

    folder.mkdir(exist_ok=True)
    texts = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(20)) for i in range(1, 30)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = {
        **RECIPE,
        "datasets": [{"path": str(folder / "corpus.jsonl")}],
        "output_dir": str(folder / "out"),
        **changes,
    }
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(values))
    launch("pretrain", STAGES["pretrain"], pretrain.main, ["--config", str(folder / "pretrain.yaml")])
    return folder / "out"


# ---------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize(
    "changes",
    [
        {"model_config": {**RECIPE["model_config"], "rms_norm_eps": -1.0}},  # the loss
        {"trainer_options": {"adam_epsilon": 0.0}},  # weights: 0/0 where a token does not occur
        {"trainer_options": {"adam_epsilon": 0.0}, "max_steps": 1},  # after the last loss
    ],
)
def test_a_run_that_diverged_is_not_complete(
    tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with the steps and what to do, exit code 2, nothing that a next stage would take; again on a restart."""
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            pretrain(tmp_path, **changes)
        assert ended.value.code == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "training diverged" in errors[0]
        assert "lower learning_rate" in errors[0]
        assert " step" in errors[0]
    out = tmp_path / "out"
    assert not (out / "lineage.json").exists()
    assert not (out / "model.safetensors").exists()
    for checkpoint in out.glob("checkpoint-*"):
        assert (checkpoint / "manifest.json").is_file(), "no checkpoint of weights that are not finite"
    for line in (out / "history.jsonl").read_text().splitlines():
        assert "null" not in line
        assert "NaN" not in line


# ---------------------------------------------------------------------------------------------- progress


def run_of(is_main: bool = True, show: bool = False) -> Any:
    return SimpleNamespace(is_main=is_main, show_progress=show, args=SimpleNamespace(quiet=False))


def test_where_nobody_watches_a_line_comes_every_half_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger("pipeline"), "handlers", [handler])
    monkeypatch.setattr(logging.getLogger("pipeline"), "level", logging.INFO)
    shown = Progress(200, "sft", run_of(), done=100)
    for _ in range(70):
        clock[0] += 1.0
        shown.update({"loss": 0.51234})
    assert lines == [
        "sft: step 130/200, loss 0.5123, 1.00 steps/s, 1 min 10 s left",
        "sft: step 160/200, loss 0.5123, 1.00 steps/s, 40 s left",
    ]
    lines.clear()
    other = Progress(200, "sft", run_of(is_main=False))
    clock[0] += 100.0
    other.update()
    assert not lines, "one rank speaks"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (59.6, "1 min 0 s"), (61, "1 min 1 s"), (7325, "2 h 2 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---------------------------------------------------------------------------------------------- ties to libraries


@pytest.mark.parametrize("method", ["evaluate", "training_step", "log", "get_batch_samples"])
def test_what_is_overridden_has_the_parameters_that_trainer_gives_it(method: str) -> None:
    """transformers 5.23: another name or order would leave our version uncalled, or called wrongly."""
    theirs, ours = (list(inspect.signature(getattr(cls, method)).parameters) for cls in (Trainer, StageTrainer))
    assert ours == theirs


def test_what_sharding_overrides_is_there_with_the_same_arguments() -> None:
    """transformers 5.23: a method that is gone would leave a sharded model whole, unsaved or unread."""
    inherited = [name for name in vars(ShardedTrainer) if not name.startswith("__") and hasattr(Trainer, name)]
    assert len(inherited) == 10
    for name in set(inherited) - {"_prepare_for_training"}:  # which hands its arguments on
        theirs, ours = (list(inspect.signature(getattr(cls, name)).parameters) for cls in (Trainer, ShardedTrainer))
        assert ours == theirs, name
    prepare = inspect.getsource(Trainer._prepare_for_training)
    assert prepare.index("self.create_optimizer()") < prepare.index("if self.is_distributed_loading_by_transformers:")
    assert "_load_optimizer_and_scheduler(" in prepare
    assert "self._load_from_checkpoint(" in inspect.getsource(Trainer.train)


def test_private_attributes_are_where_resume_looks_for_them() -> None:
    """transformers 5.23 sums the loss in `_tr_loss` from `_globalstep_last_logged` on; trl 1.16 keeps lists in `_metrics`."""
    loop = inspect.getsource(Trainer._inner_training_loop)
    assert "self._tr_loss = torch.tensor(0.0" in loop
    assert "self._globalstep_last_logged = self.state.global_step" in loop
    assert loop.index("self._tr_loss =") < loop.index("callback_handler.on_train_begin") < loop.index("on_epoch_begin")
    log = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert "tr_loss_scalar / (self.state.global_step - self._globalstep_last_logged)" in log
    for cls in (SFTTrainer, RewardTrainer):
        assert 'self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}' in inspect.getsource(
            cls.__init__
        )
        assert "self._metrics[mode].clear()" in inspect.getsource(cls.log)
    assert defaultdict(list)["num_tokens"] == []


def test_a_loss_is_logged_over_all_steps_since_the_last_row(tmp_path: Path) -> None:
    """The rows of a resumed run hold what was summed up before the checkpoint."""
    out = pretrain(tmp_path)
    rows = [row for row in history.read(out) if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("option", ["hub_token", "push_to_hub_token"])
def test_a_secret_is_no_trainer_option(tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        pretrain(tmp_path, trainer_options={option: "hf_secretsecretsecretsecret"})
    assert ended.value.code == 2
    assert "would be written to lineage.json" in capsys.readouterr().err
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"secretsecret" not in path.read_bytes(), path


def test_user_errors_are_one_line() -> None:
    assert "\n" not in str(UserError("a", file="b"))


# ---------------------------------------------------------------------------------------------- the last step


def results(folder: Path) -> dict[str, Any]:
    lineage = json.loads((folder / "lineage.json").read_text())
    rows = [{k: v for k, v in row.items() if not k.endswith("_per_second")} for row in history.read(folder)]
    return {**{key: lineage[key] for key in ("weights_sha256", "metrics", "flops")}, "history": rows}


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 10},  # within an epoch
        {"max_steps": None, "epochs": 2.0, "save_steps": 1, "logging_steps": 1, "eval_steps": 1},
    ],
)
def test_a_run_that_failed_after_its_last_step_takes_no_further_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = pretrain(tmp_path / "whole", **changes)
    out = tmp_path / "failed" / "out"
    in_the_way = out / "model.safetensors"
    in_the_way.mkdir(parents=True)  # the weights cannot be saved
    (out / ".lock").touch()
    with pytest.raises(Exception, match=r"model\.safetensors|directory"):
        pretrain(tmp_path / "failed", **changes)
    steps = json.loads((whole / "lineage.json").read_text())["metrics"]["steps"]
    assert (out / f"checkpoint-{steps}" / "manifest.json").is_file()
    in_the_way.rmdir()
    pretrain(tmp_path / "failed", **changes)
    assert results(out) == results(whole)
    assert json.loads((out / "lineage.json").read_text())["resumed_from"] == [steps]


# ---------------------------------------------------------------------------------------------- loss of demonstrations


def demonstration_trainer(folder: Path, labels: list[list[int]], tokenizer: Any, **options: Any) -> Any:
    from pipeline.data.collators import BlockCollator
    from pipeline.sft import DemonstrationTrainer

    torch.manual_seed(0)
    sizes = {k: v for k, v in RECIPE["model_config"].items() if k != "max_position_embeddings"}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    rows = [{"input_ids": [5, 6, 7, 8, 9, 10], "position_ids": [0, 1, 2, 0, 1, 2], "labels": row} for row in labels]
    settings = SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", remove_unused_columns=False, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, **options,
    )  # fmt: skip
    return DemonstrationTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=BlockCollator(0),
        processing_class=tokenizer,
    )


def gradients(trainer: Any, batch: dict[str, Any], **options: Any) -> tuple[float, list[torch.Tensor]]:
    loss = trainer.compute_loss(trainer.model, dict(batch), **options)
    trainer.model.zero_grad()
    loss.backward()
    return loss.item(), [p.grad.clone() for p in trainer.model.parameters()]


LABELS = [[-100, -100, 7, -100, 9, 10], [-100] * 6]


def test_the_loss_of_labelled_tokens_is_that_of_the_whole_rows(tmp_path: Path, tokenizer: Any) -> None:
    """Loss and every gradient, to fp32 rounding; no entropy and no top token is computed."""
    trainer = demonstration_trainer(tmp_path, LABELS, tokenizer)
    assert trainer.labelled_only
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        output = trainer.model(**batch, fused_lm_head=True)
    assert output.entropy is None
    assert output.is_top1 is None
    loss, own = gradients(trainer, batch, num_items_in_batch=torch.tensor(7))
    logits = trainer.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[:, :-1]
    whole = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum") / 7
    trainer.model.zero_grad()
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-6)
    for one, parameter in zip(own, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, atol=1e-7, rtol=1e-5)


def test_a_batch_without_labels_has_a_loss_of_zero_and_gradients(tmp_path: Path, tokenizer: Any) -> None:
    trainer = demonstration_trainer(tmp_path, [[-100] * 6], tokenizer)
    loss, own = gradients(trainer, next(iter(trainer.get_train_dataloader())), num_items_in_batch=torch.tensor(5))
    assert loss == 0
    assert not any(gradient.any() for gradient in own)


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}])
def test_other_losses_of_trl_are_its_own(options: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    trainer = demonstration_trainer(tmp_path, LABELS, tokenizer, **options)
    assert not trainer.labelled_only
    gradients(trainer, next(iter(trainer.get_train_dataloader())))
    assert trainer._metrics["train"]["entropy"]


@pytest.mark.parametrize("fault", ["scale of another name", "adapter on the head"])
def test_a_head_that_trl_does_not_know_keeps_the_models_own_loss(fault: str, tmp_path: Path, tokenizer: Any) -> None:
    """Logits that a model scales by itself: the loss is computed from them."""
    trainer = demonstration_trainer(tmp_path, LABELS, tokenizer)
    if fault == "adapter on the head":
        head = get_peft_model(trainer.model, LoraConfig(r=2, target_modules=["lm_head"])).base_model.model
        assert not fused_head_gives_the_loss(head)
        return
    model = trainer.model
    plain = type(model).forward

    class Scaled(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, labels: Any = None, **options: Any) -> Any:
            output = plain(self, *args, **options)
            output.logits = 3 * output.logits
            if labels is not None:
                output.loss = self.loss_function(logits=output.logits, labels=labels, vocab_size=self.vocab_size)
            return output

    del model.forward  # TRL's head
    model.__class__ = Scaled
    utils.add_fused_lm_head(model)
    assert not fused_head_gives_the_loss(model)


def test_trl_decides_by_a_private_function_whether_unlabelled_tokens_are_scored() -> None:
    """trl 1.16: without it, SFT would compute logits of every token again."""
    assert "compact = _use_triton(hidden_states.device)" in inspect.getsource(utils.add_fused_lm_head)


# ---------------------------------------------------------------------------------------------- weights that are saved


def test_weights_are_handed_on_in_bf16_where_the_recipe_says_so(tmp_path: Path) -> None:
    """The fp32 run's weights rounded once; lineage records key and hash; the next stage trains fp32 masters from them."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    whole, rounded = pretrain(tmp_path / "one"), pretrain(tmp_path / "two", save_dtype="bf16")
    full, half = (load_file(folder / "model.safetensors") for folder in (whole, rounded))
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)
    assert json.loads((rounded / "config.json").read_text())["dtype"] == "bfloat16"
    lineage = json.loads((rounded / "lineage.json").read_text())
    assert lineage["recipe"]["save_dtype"] == "bf16"
    assert lineage["weights_sha256"] == weights_sha256(rounded)
    plain = AutoModelForCausalLM.from_pretrained(rounded)
    assert plain.dtype == torch.bfloat16

    (tmp_path / "three").mkdir()
    changes: dict[str, Any] = {"config_class": "LlamaConfig", "train_tokenizer": None, "model_config": {}}
    after = pretrain(tmp_path / "three", parent=str(rounded), **changes)
    assert {tensor.dtype for tensor in load_file(after / "model.safetensors").values()} == {torch.float32}


def test_merging_holds_the_base_once(tmp_path: Path, tiny_lm: Any, tokenizer: Any) -> None:
    tiny_lm.save_pretrained(tmp_path / "base")
    base = load_causal_lm(str(tmp_path / "base"))
    adapted = get_peft_model(
        base, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", target_modules="all-linear")
    )
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).logits

    def load_base() -> Any:
        assert not sum(p.numel() for p in adapted.parameters() if not p.requires_grad)
        return load_causal_lm(str(tmp_path / "base"))

    trainer = SimpleNamespace(
        model=adapted,
        args=SimpleNamespace(output_dir=str(tmp_path / "out")),
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        is_world_process_zero=lambda: True,
    )
    save_trained(trainer, tokenizer, load_base)
    with torch.no_grad():
        merged = load_causal_lm(str(tmp_path / "out")).eval()(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, atol=2e-5, rtol=2e-5)
