"""The reward stage beyond a plain run: TRL's own loss on pairs, encoders, ties, trust, folds, ensembles, `rlhf score`."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.launches import ROOT, environment, lineage, rlhf_here, tiny_flags
from helpers.tiny_models import make_lm
from pipeline import reward
from pipeline.config.reader import load
from pipeline.config.reward import RewardArguments
from pipeline.config.stages import STAGES
from pipeline.data.batching import LengthGroupedSampler
from pipeline.data.collators import RankingCollator
from pipeline.data.encoded_rankings import FEATURES, RankingOptions, encode_rankings, for_training
from pipeline.data.encoding import ROLE_TEMPLATE, ChatEncoder
from pipeline.data.entries import DatasetEntry
from pipeline.data.records import parse_ranking
from pipeline.data.splits import labeler_folds
from pipeline.errors import UserError
from pipeline.models.loading import check_context_length
from pipeline.models.reward_model import init_head, load_scalar_model, score_ids
from pipeline.models.tokenizers import assign_template
from pipeline.reward import RankingTrainer
from pipeline.rollout.rewards import DISAGREEMENT, Answers, RewardPart, Scorer, score
from pipeline.training.stage import launch

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)
from trl import RewardConfig, RewardTrainer

PAIRS = [
    {"prompt": "Hello, my lamp is broken.", "chosen": "We are sorry, we send a new lamp.", "rejected": "No."},
    {"prompt": "Hi!", "chosen": "How can we help?", "rejected": "Go away and never come back to our shop."},
    {"prompt": "My radio is late.", "chosen": "It comes on Monday.", "rejected": "Radios are late.", "margin": 0.4},
]


def arguments(tmp_path: Path, **changes: Any) -> RewardArguments:
    return RewardArguments(output_dir=str(tmp_path / "out"), datasets=[DatasetEntry(path="x")], parent="x", **changes)


def encoded(tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> list[Any]:
    tokenizer.chat_template = tokenizer.chat_template or ROLE_TEMPLATE
    records = [{**parse_ranking(row), "row": row, "line": n} for n, row in enumerate(rows, 1)]
    options = {"max_tokens": 1024, **options}
    return list(encode_rankings(ChatEncoder(tokenizer), records, RankingOptions(**options), "training"))


@pytest.fixture
def scalar(tokenizer: Any, tmp_path: Path) -> Any:
    make_lm("llama", tokenizer).save_pretrained(tmp_path / "lm")
    model = load_scalar_model(str(tmp_path / "lm"))
    model.config.pad_token_id = tokenizer.pad_token_id
    init_head(model, None, 0)
    return model


def gradients(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_a_pair_has_the_loss_and_gradient_of_trl(scalar: Any, tokenizer: Any, tmp_path: Path) -> None:
    """On comparisons our trainer is TRL's: the same loss, margin and gradient for the same token ids."""
    rows = encoded(tokenizer, PAIRS)
    ours, theirs = scalar, copy.deepcopy(scalar)
    config = RewardConfig(
        output_dir=str(tmp_path / "trl"), report_to="none", use_cpu=True, bf16=False, max_length=None,
        disable_dropout=False, gradient_checkpointing=False, remove_unused_columns=False, per_device_train_batch_size=4,
    )  # fmt: skip
    table = datasets.Dataset.from_list([for_training(row) for row in rows], features=FEATURES)
    trainer: Any = RankingTrainer(
        model=ours, args=config, train_dataset=table, data_collator=RankingCollator(tokenizer.pad_token_id), processing_class=tokenizer
    )  # fmt: skip
    pairs = [{"chosen_ids": row["ids"][0], "rejected_ids": row["ids"][1], "margin": row["margin"]} for row in rows]
    peer: Any = RewardTrainer(
        model=theirs, args=config, train_dataset=datasets.Dataset.from_list(pairs), processing_class=tokenizer
    )
    loss = trainer.compute_loss(ours, trainer.data_collator([for_training(row) for row in rows]))
    reference = peer.compute_loss(theirs, peer.data_collator(pairs))
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    loss.backward()
    reference.backward()
    assert gradients(ours).norm() > 0.01
    assert (gradients(ours) - gradients(theirs)).norm() < 1e-5 * gradients(theirs).norm()


def test_a_ranking_is_the_mean_of_its_pairs(scalar: Any, tokenizer: Any, tmp_path: Path) -> None:
    """K = 4 in one element: K forwards, and the loss and gradient of all six pairs shuffled apart, each weighing 1/6."""
    row = {"prompt": "Hi!", "responses": ["How can we help?", "Yes?", "What?", "Go."], "ranks": [1, 2, 3, 4]}
    (whole,) = encoded(tokenizer, [row])
    apart = [
        {"prompt": "Hi!", "chosen": row["responses"][i], "rejected": row["responses"][j]}
        for i in range(4)
        for j in range(i + 1, 4)
    ]
    found = []
    for rows in ([whole], encoded(tokenizer, apart)):
        scalar.zero_grad()
        batch = RankingCollator(tokenizer.pad_token_id)(rows)
        loss = RankingTrainer.compute_loss(RankingTrainer.__new__(RankingTrainer), scalar, batch)
        loss.backward()
        found.append((loss.item(), gradients(scalar).clone(), len(batch["input_ids"])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert (found[0][1] - found[1][1]).norm() < 1e-5 * found[1][1].norm()
    assert (found[0][2], found[1][2]) == (4, 12), "each response is read once"


def test_trust_in_a_record(tokenizer: Any, tmp_path: Path) -> None:
    row = {**PAIRS[0], "labeler": "ana", "confidence": 0.8}

    def first(**changes: Any) -> tuple[float, float]:
        (found,) = encoded(tokenizer, [row], **changes)
        return found["pairs"][0]["target"], found["weight"]

    assert first() == (1.0, 1.0)
    assert first(confidence="target") == (0.8, 1.0)
    assert first(confidence="weight") == (1.0, 0.8)
    assert first(label_smoothing=0.1) == (0.9, 1.0)
    assert first(confidence="target", label_smoothing=0.1) == pytest.approx((0.8 * 0.9 + 0.2 * 0.1, 1.0))
    assert first(labeler_weights={"ana": 0.5, "ben": 3.0}) == (1.0, 0.5)
    for value, use, message in ((0.3, "target", "no probability of being right"), (-1, "weight", "cannot weigh")):
        row["confidence"] = value
        with pytest.raises(UserError, match=f"line 1: confidence {value} {message}|line 1: confidence {value} is"):
            first(confidence=use)


def test_folds_keep_every_labeler_out_once() -> None:
    names = [f"labeler {n}" for n in range(13)]
    folds = labeler_folds(names, 5)
    assert sorted(name for fold in folds for name in fold) == sorted(names)
    assert {len(fold) for fold in folds} == {2, 3}
    assert labeler_folds(names[::-1], 5) == folds
    with pytest.raises(UserError, match="5 groups of 3 labelers"):
        labeler_folds(names[:3], 5)


def test_like_lengths_go_together_in_no_order_of_length() -> None:
    lengths = torch.randint(5, 200, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthGroupedSampler(lengths, 8, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(1003))
    assert order == list(LengthGroupedSampler(lengths, 8, seed=3))
    batches = [[lengths[i] for i in order[k : k + 8]] for k in range(0, 1000, 8)]
    assert sum(max(b) - min(b) for b in batches) / len(batches) < 15, "195 apart without grouping"
    means = torch.tensor([sum(b) / len(b) for b in batches])
    ranks = torch.arange(len(means), dtype=torch.float32)
    assert torch.corrcoef(torch.stack([means, ranks]))[0, 1].abs() < 0.25
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_several_reward_models_and_their_doubt() -> None:
    values = {"a": [1.0, 4.0], "b": [3.0, 4.0], "f": [0.5, 0.0]}

    def part(name: str, parent: Any) -> RewardPart:
        return RewardPart(name, 1.0, lambda _: torch.tensor(values[name]), parent)

    parts = [part("a", object()), part("b", object()), part("f", None)]
    prompt = [{"role": "user", "content": "x"}]
    answers = Answers([prompt] * 2, [[0]] * 2, [[0]] * 2, texts=["", ""], rows=[{}] * 2)
    found = {ensemble: Scorer(parts, ensemble, 0.5)(answers) for ensemble in ("sum", "mean", "lower")}
    assert found["sum"].scores.tolist() == [4.5, 8.0]
    assert found["mean"].scores.tolist() == [2.5, 4.0]
    assert found["lower"].scores.tolist() == [2.0, 4.0]
    assert found["lower"].parts[DISAGREEMENT].tolist() == [1.0, 0.0]
    assert DISAGREEMENT not in found["sum"].parts


def test_an_ensemble_needs_members(tmp_path: Path) -> None:
    recipe = tmp_path / "ppo.yaml"
    recipe.write_text("parent: a\noutput_dir: b\nreward: c\nensemble: lower\ndatasets:\n  - path: d\n")
    with pytest.raises(UserError, match="ensemble: lower needs two reward models"):
        load(STAGES["ppo"], ["--config", str(recipe)])


# ------------------------------------------------------------------------------------------------ whole runs


def run(folder: Path, recipes: Path, extra: str, **changes: Any) -> Path:
    recipe = folder / "reward.yaml"
    text = (recipes / "reward.yaml").read_text()
    recipe.write_text(text.replace("group_by_length: false", "group_by_length: true") + extra)
    sizes = {"max_steps": 8, "eval_steps": 4, "save_steps": 4, "logging_steps": 2, "report_to": None}
    flags = tiny_flags("reward", folder, config=recipe, **{**sizes, **changes})
    launch("reward", STAGES["reward"], reward.main, flags)
    return folder / "reward"


def encoder_model(style: str, folder: Path) -> Path:
    """A tiny encoder with a word-level tokenizer of its kind, as it would come from the Hub."""
    words = sorted({w for line in (ROOT / "data_cards/demo_comparisons/train.jsonl").read_text().splitlines()[:50] for w in line.split()})  # fmt: skip
    names = ("<s>", "<pad>", "</s>", "<unk>") if style == "roberta" else ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    vocab = {name: n for n, name in enumerate([*names, *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=names[3] if style == "roberta" else names[1]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    start, end = (names[0], names[2]) if style == "roberta" else (names[2], names[3])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, vocab[start]), (end, vocab[end])]
    )
    special: dict[str, Any] = {"cls_token": start, "sep_token": end}
    special |= {"pad_token": names[1], "unk_token": names[3], "bos_token": start, "eos_token": end} if style == "roberta" else {"pad_token": names[0], "unk_token": names[1]}  # fmt: skip
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    sizes = dict(
        vocab_size=len(vocab), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    torch.manual_seed(0)
    if style == "bert":
        BertForMaskedLM(BertConfig(**sizes, pad_token_id=0)).save_pretrained(folder)
    elif style == "roberta":
        config = RobertaConfig(
            **sizes, max_position_embeddings=162, pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1
        )
        RobertaForMaskedLM(config).save_pretrained(folder)
    else:
        config = DebertaV2Config(
            **sizes, pad_token_id=0, relative_attention=True, position_buckets=16, pos_att_type=["p2c", "c2p"]
        )
        DebertaV2ForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("style", "extra"),
    [
        ("bert", ""),
        *(
            pytest.param(*v, marks=pytest.mark.full)
            for v in (("roberta", ""), ("deberta", ""), ("bert", "lora:\n  r: 4\n  alpha: 8\n"))
        ),
    ],
    ids=["bert", "roberta", "deberta", "bert-lora"],
)
def test_encoders_are_backbones_too(style: str, extra: str, recipes: Path, tmp_path: Path) -> None:
    base = encoder_model(style, tmp_path / "base")
    folder = run(tmp_path, recipes, extra, parent=base)
    metrics = lineage(folder)["metrics"]
    assert metrics["sensitivity"]["edited_after_eos"] < 1e-5, "what stands behind the mask is not read"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = ChatEncoder(tokenizer).prompt_ids([{"role": "user", "content": "Hello"}])
    assert ids[0] == tokenizer.cls_token_id
    good, bad = score(["Hello, my lamp is broken."] * 2, ["We are sorry.", "No."], str(folder))
    assert good != bad
    base_weights, trained = load_scalar_model(str(base)).state_dict(), model.state_dict()
    assert any(not torch.equal(trained[n], base_weights[n]) for n in trained if "layer" in n)


def test_positions_of_roberta_count_from_behind_the_pad() -> None:
    config = RobertaConfig(max_position_embeddings=514, pad_token_id=1)
    check_context_length(config, 512, "max_tokens")
    with pytest.raises(UserError, match="513 tokens exceed the model's context of 512"):
        check_context_length(config, 513, "max_tokens")


def test_a_template_is_assigned_once() -> None:
    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )
    assert assign_template(tokenizer)
    assert tokenizer.eos_token == "[SEP]"
    assert assign_template(tokenizer) is None


def test_unit_variance_over_the_parents_answers(scalar: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Scores of answers sampled from the parent spread by 1: the very samples exactly, others nearly (Ziegler et al. 2019)."""
    from pipeline.data.sources import Source
    from pipeline.models.reward_model import ScoreReader, score_ids
    from pipeline.rollout.score_scale import TrainedScores, distinct_prompts, sample_answers, scale_to_unit_variance
    from pipeline.training.processes import Processes

    tokenizer.chat_template = tokenizer.chat_template or ROLE_TEMPLATE
    lines = (ROOT / "data_cards/demo_comparisons/train.jsonl").read_text(encoding="utf-8").splitlines()[:400]
    rows = [json.loads(line) for line in lines]
    records = [{**parse_ranking(row), "row": row, "line": n} for n, row in enumerate(rows, 1)]
    args = dataclasses.replace(arguments(tmp_path), parent=str(tmp_path / "lm"), max_tokens=110)
    encoder, pad_id = ChatEncoder(tokenizer), tokenizer.pad_token_id
    prompts = distinct_prompts([Source("demo", records, "")], [list(range(len(records)))], 128)
    assert len({repr(prompt) for prompt in prompts}) == len(prompts) == 128
    before = scalar.score.weight.clone()
    scores = TrainedScores(ScoreReader(scalar), encoder, Processes(), None, torch.device("cpu"))
    scale = scale_to_unit_variance(scores, prompts, args)
    assert torch.allclose(scalar.score.weight, before * scale)
    assert scale != 1.0
    ids = [encoder.prompt_ids(prompt) for prompt in prompts]
    for seed, tolerance in ((0, 1e-4), (1, 0.2)):
        rows_of_seed = sample_answers(scores, ids, dataclasses.replace(args, seed=seed))
        assert score_ids(scalar, rows_of_seed, pad_id).std().item() == pytest.approx(1.0, abs=tolerance)


def test_a_scaled_adapter_stays_the_merged_model(chain: Path, recipes: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = run(tmp_path, recipes, "unit_variance_samples: 32\nlora:\n  r: 4\n  alpha: 8\n", parent=chain / "sft")
    assert lineage(folder)["metrics"]["score_scale"] != 1.0
    head = load_file(folder / "adapter" / "adapter_model.safetensors")
    (saved,) = [value for name, value in head.items() if name.endswith("score.weight")]
    assert torch.allclose(saved, load_scalar_model(str(folder)).score.weight, rtol=1e-5)


def test_a_run_with_every_option_of_the_loss(chain: Path, recipes: Path, tmp_path: Path) -> None:
    extra = "ties: margin\nlabel_smoothing: 0.05\nconfidence: weight\nlabeler_weights:\n  ana: 2.0\n  dev: 0.5\n"
    folder = run(tmp_path, recipes, extra, parent=chain / "sft")
    metrics = lineage(folder)["metrics"]
    assert metrics["pairs"] > lineage(chain / "reward")["metrics"]["pairs"], "tied pairs are trained on"
    assert {"ece", "ece_before_scaling", "temperature", "calibration", "length_bias", "sensitivity"} <= set(metrics)
    assert set(metrics["share_of_ceiling_by_labeler"]) == {"ana", "ben", "chloe", "dev", "erik"}
    config = json.loads((folder / "config.json").read_text())
    assert config["score_temperature"] == metrics["temperature"]


@pytest.mark.full
def test_a_reward_model_in_bf16_scores_as_its_rounded_weights_do(chain: Path, recipes: Path, tmp_path: Path) -> None:
    """Its body is rounded once, its head stays fp32, and scores are those of fp32 up to that rounding."""
    folder = run(tmp_path, recipes, "", parent=chain / "sft", save_dtype="bf16")
    weights = load_file(folder / "model.safetensors")
    assert {str(tensor.dtype) for name, tensor in weights.items() if "score" in name} == {"torch.float32"}
    assert {str(tensor.dtype) for name, tensor in weights.items() if "score" not in name} == {"torch.bfloat16"}
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole", recipes, "", parent=chain / "sft")
    ids = [[5, 6, 7, 8], [9, 10]]
    one, other = (score_ids(load_scalar_model(str(path)).eval(), ids, 1) for path in (folder, whole))
    assert torch.allclose(one, other, atol=0.05)
    assert not torch.equal(one, other)


def test_unknown_labelers_are_named(chain: Path, recipes: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "reward.yaml"
    recipe.write_text((recipes / "reward.yaml").read_text() + "labeler_weights:\n  anna: 2.0\n")
    flags = tiny_flags("reward", tmp_path, config=recipe, parent=chain / "sft", report_to=None)
    done = subprocess.run(
        [sys.executable, str(ROOT / "pipeline" / "reward.py"), *flags],
        env=environment(), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "labeler_weights: no ranking by 'anna'; labelers: ana, ben, chloe, dev, erik" in done.stderr


def rlhf(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *map(str, arguments)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done


def test_scores_beside_rows(chain: Path, tmp_path: Path) -> None:
    """Rankings and demonstrations; cut off anywhere, the same command ends with the same file."""
    source = tmp_path / "r.jsonl"
    rows = (ROOT / "data_cards/demo_comparisons/train.jsonl").read_text(encoding="utf-8").splitlines()[:150]
    source.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "out.jsonl"
    assert "150 rows in" in rlhf_here("score", source, "--reward", chain / "reward", "--output", out)[0]
    whole = out.read_bytes()
    scored = [json.loads(line) for line in whole.decode().splitlines()]
    first = scored[0]
    expected = score([first["prompt"]] * len(first["responses"]), first["responses"], str(chain / "reward"))
    assert first["scores"] == pytest.approx(expected, abs=1e-4)
    assert {k: v for k, v in first.items() if k != "scores"} == json.loads(rows[0])
    out.write_bytes(whole[: len(whole) * 2 // 3])  # as a kill would leave it: half a line at the end
    again = rlhf_here("score", source, "--reward", chain / "reward", "--output", out)
    assert "of them before" in again[0]
    repeated = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["prompt"] for r in repeated] == [r["prompt"] for r in scored]
    for a, b in zip(repeated, scored, strict=True):
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-4)

    source.write_text(rows[0] + "\n")
    refused = rlhf_here("score", source, "--reward", chain / "reward", "--output", out, code=2)
    assert "holds scores of other rows or of another model" in refused[1]
    assert len(out.read_text().splitlines()) == 150, "nothing is overwritten"
    (tmp_path / "mine.jsonl").write_text("my notes\n")
    mine = rlhf_here("score", source, "--reward", chain / "reward", "--output", tmp_path / "mine.jsonl", code=2)
    assert "was not written by rlhf score" in mine[1]
    assert "is the input" in rlhf_here("score", source, "--reward", chain / "reward", "--output", source, code=2)[1]

    source.write_text('{"question": "Hi!", "response": "Hello."}\n{"question": "Hi!", "response": "No."}\n')
    rlhf_here("score", source, "--reward", chain / "reward", "--column", "prompt=question")
    found = [json.loads(line) for line in (tmp_path / "r.scored.jsonl").read_text().splitlines()]
    assert [set(row) for row in found] == [{"question", "response", "score"}] * 2
    source.write_text('{"prompt": "Hi!", "response": "Hello."}\n{"prompt": "Hi!"}\n')
    bad = rlhf_here("score", source, "--reward", chain / "reward", "--output", tmp_path / "none.jsonl", code=2)
    assert f"{source}:2: " in bad[1]
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.full
def test_seeds_and_folds_of_one_run(chain: Path, recipes: Path, tmp_path: Path) -> None:
    import yaml

    recipe = tmp_path / "recipe"
    recipe.mkdir()
    values = yaml.safe_load((recipes / "reward.yaml").read_text())
    values |= {
        "parent": str(chain / "sft"),
        "max_steps": 6,
        "eval_steps": 6,
        "save_steps": 6,
        "logging_steps": 2,
        "threads": 1,
    }
    values.pop("report_to", None)
    (recipe / "reward.yaml").write_text(yaml.safe_dump(values))
    out = tmp_path / "seeds"
    done = rlhf("run", recipe, "--output-dir", out, "--reward-seeds", 2)
    assert "mean ± standard deviation" in done.stdout
    assert [lineage(out / name)["recipe"]["seed"] for name in ("reward", "reward-seed-1")] == [0, 1]
    assert lineage(out / "reward")["weights_sha256"] != lineage(out / "reward-seed-1")["weights_sha256"]
    values.pop("held_out_labelers")
    (recipe / "reward.yaml").write_text(yaml.safe_dump(values))
    rlhf("run", recipe, "--output-dir", tmp_path / "folds", "--labeler-folds", 2)
    kept_out = [set(lineage(tmp_path / "folds" / f"reward-fold-{n}")["metrics"]["kept_out_labelers"]) for n in range(2)]
    assert kept_out[0] | kept_out[1] == {"ana", "ben", "chloe", "dev", "erik"}
    assert not kept_out[0] & kept_out[1]
