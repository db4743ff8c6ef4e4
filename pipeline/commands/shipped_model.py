"""The part of a finished stage that is shipped.

Weights, tokenizer, chat template, generation config with every stop token and a card; no value network, adapter, logs,
samples, prompts or paths of the machine that trained it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.stages import STAGES
from pipeline.data.encoding import ChatEncoder
from pipeline.errors import UserError
from pipeline.models.loading import load_causal_lm
from pipeline.models.reward_model import load_scalar_model
from pipeline.models.tokenizers import load_tokenizer, set_stop_tokens, stop_token_ids
from pipeline.training.checkpoints import remove
from pipeline.training.identity import tokenizer_hashes
from pipeline.training.lineage import LINEAGE, Parent, read_lineage, verify_parent
from pipeline.training.model_card import write_model_card
from pipeline.training.output_folder import share_file_modes

import torch

ORDER = ("ppo", "sft", "pretrain", "reward")  # of a run's folder, the first that is finished
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LARGEST_FILE = "5GB"
PROBE_TOKENS = 32


def export(source: Path, target: Path, dtype: str = "fp32", name: str | None = None) -> Parent:
    """Write the shipped part of a finished stage to `target`, which appears when it is whole; returns the stage.

    Args:
        name: of the model in its card; default: the target's.

    Raises:
        UserError: nothing finished in `source`, it changed since, or `target` holds something.
    """
    folder = finished_stage(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to {str(target)!r} is no empty folder; nothing is overwritten, name a new one")
    parent = verify_parent(str(folder), tuple(STAGES))
    temporary = target.with_name(target.name + ".tmp")
    remove(temporary)
    try:
        temporary.mkdir(parents=True)
        _write(parent, temporary, name or target.name, dtype)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except BaseException:
        remove(temporary)
        raise
    return parent


def finished_stage(source: Path, order: Sequence[str] = ORDER) -> Path:
    """The folder of a finished stage: `source` itself, or of a run the first of `order` that is finished.

    Raises:
        UserError: there is none.
    """
    if not source.is_dir():
        raise UserError(f"{str(source)!r} is no folder; name a run's or a stage's")
    if (source / LINEAGE).exists():
        return source
    finished = [source / stage for stage in order if (source / stage / LINEAGE).exists()]
    if not finished:
        raise UserError(f"{str(source)!r} holds no finished stage: no {LINEAGE} in it or in {', '.join(order)}")
    return finished[0]


def _write(parent: Parent, folder: Path, name: str, dtype: str) -> None:
    lineage = read_lineage(Path(parent.path))
    assert lineage is not None
    tokenizer = load_tokenizer(parent.path)
    parent.check_tokenizer(tokenizer)
    if parent.stage == "reward":
        model: Any = load_scalar_model(parent.path)
    else:
        model = load_causal_lm(parent.path)
        if tokenizer.eos_token_id is not None:
            set_stop_tokens(model, stop_token_ids(ChatEncoder(tokenizer), model.generation_config))
    cast_weights(model.eval(), DTYPES[dtype])
    model.config.name_or_path = ""
    model.save_pretrained(folder, max_shard_size=LARGEST_FILE)
    tokenizer.save_pretrained(folder)
    check_same(model, tokenizer, folder, parent.stage == "reward")
    write_model_card(
        folder,
        lineage["stage"],
        recipe=lineage["recipe"],
        parents=lineage["parents"],
        datasets=lineage["datasets"],
        metrics=lineage["metrics"],
        name=name,
        note=f"Weights are {dtype}.",
    )
    share_file_modes(folder, like=folder / "README.md")


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """As `from_pretrained` does: buffers that are not stored, such as the frequencies of rotary positions, stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


@torch.no_grad()
def check_same(model: Any, tokenizer: Any, folder: Path, reward: bool) -> None:
    """Load what was written with plain transformers and compare it with what was to be written.

    Raises:
        UserError: the logits of a few tokens, or the tokenizer, differ.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    again = auto.from_pretrained(folder, dtype=model.dtype).eval()
    ids = torch.arange(PROBE_TOKENS)[None] % model.get_input_embeddings().weight.shape[0]
    if not torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits):
        raise UserError("the exported model gives other logits than the trained one; nothing was exported", file=folder)
    if tokenizer_hashes(load_tokenizer(str(folder))) != tokenizer_hashes(tokenizer):
        raise UserError("the exported tokenizer differs from the trained one's; nothing was exported", file=folder)
