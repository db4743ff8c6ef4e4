"""Alignment tax: each stage's perplexity on the text that pretraining held out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pipeline.config.stages import ANSWERING
from pipeline.data.collators import BlockCollator
from pipeline.data.documents import split_texts
from pipeline.data.encoding import document_ids
from pipeline.data.packing import Block, pack_documents
from pipeline.data.sources import read_sources
from pipeline.errors import UserError
from pipeline.evaluation.answers import load_finite_model
from pipeline.evaluation.language import perplexity
from pipeline.evaluation.run_folder import RunFolder, dataset_entries
from pipeline.models.token_nll import token_nll
from pipeline.models.tokenizers import load_tokenizer
from pipeline.models.trials import isolates_packed_documents
from pipeline.training.identity import tokenizer_hashes

import torch

BLOCKS = 200  # of held-out text at most
BATCH = 8  # blocks per forward pass


@torch.no_grad()
def alignment_tax(run: RunFolder, outside: dict[str, Path], data_root: str | None) -> dict[str, Any] | None:
    """Perplexity of every stage, and of outside models with the same tokens (a run without ptx, say).

    Returns:
        `perplexity` by model, and `tokens`; None, with a note where it is a lack, if nothing can be measured.
    """
    if "pretrain" not in run.lineages:
        return None
    tokenizer = load_tokenizer(str(run.path / "pretrain"))
    texts = _held_out_texts(run, data_root)
    if not texts:
        return None
    documents = document_ids(tokenizer, texts)
    blocks: list[Block] = []
    packed = False  # whether a block holds several documents, as the first model, and so the run's architecture, allows
    perplexities: dict[str, float] = {}
    tokens = 0
    for name, place in {**{s: run.path / s for s in ANSWERING if s in run.lineages}, **outside}.items():
        if tokenizer_hashes(load_tokenizer(str(place)))[0] != tokenizer_hashes(tokenizer)[0]:
            run.note(f"{name}: has another tokenizer than pretraining's; its perplexity would be of other tokens")
            continue
        try:
            model = load_finite_model(place)
        except UserError as error:
            run.note(f"{name}: its perplexity was not measured: {error}")
            continue
        isolated = isolates_packed_documents(model)
        if not blocks:
            packed = isolated
            blocks = pack_documents(documents, run.recipe("pretrain")["block_tokens"], isolated=packed)[:BLOCKS]
            if not blocks:  # documents of one token each
                return None
        if packed and not isolated:
            run.note(
                f"{name}: its perplexity was not measured: documents that share a block see each other in this model"
            )
            continue
        collate = BlockCollator(tokenizer.pad_token_id, position_ids=packed)
        batches = (collate(blocks[i : i + BATCH]) for i in range(0, len(blocks), BATCH))
        nll, tokens, _ = token_nll(model, batches, next(model.parameters()).device)
        if math.isfinite(nll):
            perplexities[name] = perplexity(nll, tokens)
        else:
            run.note(f"{name}: its perplexity is not finite")
    return {"perplexity": perplexities, "tokens": tokens} if perplexities else None


def _held_out_texts(run: RunFolder, data_root: str | None) -> list[str]:
    """The text that pretraining held out; none, with a note, where the data is not here."""
    recipe = run.recipe("pretrain")
    try:
        entries = dataset_entries(recipe, "datasets")
        if any(entry.streaming for entry in entries):
            run.note("alignment tax not measured: pretraining's data was streamed, and is not read again")
            return []
        sources = read_sources(entries, "document", data_root or recipe.get("data_root") or ".")
    except UserError as error:
        run.note(f"alignment tax not measured: {error}")
        return []
    return [text for source in sources for text in split_texts(source, recipe["held_out_fraction"])[1]]
