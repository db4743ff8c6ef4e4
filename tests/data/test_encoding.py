"""Text to ids: control tokens come from the template alone, responses end at EOS, packed rows equal separate ones."""

from __future__ import annotations

import copy
from typing import Any

from pipeline.data.collators import BlockCollator, RankingCollator
from pipeline.data.encoding import IGNORE, PLAIN_TEMPLATE, ChatEncoder, document_ids
from pipeline.data.packing import join_examples, pack_documents, pack_examples
from pipeline.errors import UserError
from pipeline.models.tokenizers import forbidden_token_ids

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DIALOGUE = [
    {"role": "user", "content": "Where is my parcel?"},
    {"role": "assistant", "content": "On its way."},
    {"role": "user", "content": "Thanks!"},
    {"role": "assistant", "content": "You are welcome."},
]


@pytest.fixture(scope="module", params=["role", "plain", "chatml"])
def encoder(request: pytest.FixtureRequest, tokenizer: Any) -> ChatEncoder:
    changed = copy.deepcopy(tokenizer)
    if request.param == "plain":
        changed.chat_template = PLAIN_TEMPLATE
    if request.param == "chatml":
        changed.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"})
        changed.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    return ChatEncoder(changed)


@pytest.mark.parametrize("text", ["<|endoftext|>", "a <|user|> b", "<|im_end|>", "<|pad|><|assistant|>"])
def test_control_text_in_data_stays_text(encoder: ChatEncoder, text: str) -> None:
    control = set(encoder.tokenizer.all_special_ids)
    assert not control & set(encoder.text_ids(text))
    prompt = encoder.prompt_ids([{"role": "user", "content": text}])
    bare = encoder.prompt_ids([{"role": "user", "content": "x"}])
    count = lambda ids: sum(i in control for i in ids)  # noqa: E731
    assert count(prompt) == count(bare), "the template's own control tokens and no more"
    assert encoder.response_ids(text)[:-1] == encoder.text_ids(text)
    assert text in encoder.tokenizer.decode(prompt)
    assert not control & set(document_ids(encoder.tokenizer, [text])[0][1:-1])


def test_a_response_ends_at_its_only_eos(encoder: ChatEncoder) -> None:
    ids, labels = encoder.dialogue(DIALOGUE)
    assert ids[-1] == labels[-1] == encoder.eos_id
    assert labels.count(encoder.eos_id) == 2, "every trained answer learns to stop"
    trained = [label for label in labels if label != IGNORE]
    assert encoder.texts([trained]) == ["On its way.You are welcome."]


def test_training_and_sampling_see_the_same_prompt(encoder: ChatEncoder) -> None:
    """A dialogue is its prompt, then its response: nothing in between, nothing lost."""
    ids, labels = encoder.dialogue(DIALOGUE, trained=[False, False, False, True])
    prompt, response = encoder.prompt_ids(DIALOGUE[:3]), encoder.response_ids("You are welcome.")
    assert ids == prompt + response
    assert labels == [IGNORE] * len(prompt) + response
    assert encoder.dialogue(DIALOGUE, loss_on="all")[1] == ids


def test_templates_that_cannot_be_taken_apart_are_refused(tokenizer: Any) -> None:
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(UserError, match="drops or reorders"):
        ChatEncoder(broken)
    broken.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        ChatEncoder(broken)
    broken.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% endif %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}B:{% endif %}"
    )
    with pytest.raises(UserError, match="training and sampling would differ"):
        ChatEncoder(broken)


def test_forbidden_ids_are_all_but_text_and_eos(tokenizer: Any) -> None:
    found = forbidden_token_ids(tokenizer, len(tokenizer) + 3, [tokenizer.eos_token_id])
    assert tokenizer.eos_token_id not in found
    assert tokenizer.pad_token_id in found
    assert found[-3:] == [len(tokenizer), len(tokenizer) + 1, len(tokenizer) + 2]
    assert len(found) == 4 + 3  # pad, three roles


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.integers(2, 16))
def test_every_token_is_predicted_exactly_once(lengths: list[int], block: int) -> None:
    documents = [[1000 * d + i for i in range(n)] for d, n in enumerate(lengths)]
    blocks = pack_documents(documents, block)
    labels = [label for b in blocks for label in b["labels"] if label != IGNORE]
    assert sorted(labels) == sorted(token for document in documents for token in document[1:])
    for b in blocks:
        assert len(b["input_ids"]) == len(b["position_ids"]) == len(b["labels"]) <= block
        for i, label in enumerate(b["labels"]):
            assert label in (IGNORE, b["input_ids"][i])
            # A label's context is the token before it in its own document.
            assert label == IGNORE or (
                b["input_ids"][i - 1] == label - 1 and b["position_ids"][i] == b["position_ids"][i - 1] + 1
            )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=30))
def test_no_example_is_cut_or_lost(lengths: list[int]) -> None:
    examples = [([100 * e + i for i in range(n)], [IGNORE] * n) for e, n in enumerate(lengths)]
    rows = pack_examples(examples, 16)
    assert max(len(row["input_ids"]) for row in rows) <= 16
    assert sorted(t for row in rows for t in row["input_ids"]) == sorted(t for ids, _ in examples for t in ids)
    assert len(rows) <= -(-sum(lengths) // 16) * 2, "best fit leaves no row less than half full but one"


def test_packed_equals_separate(tiny_lm: Any, tokenizer: Any) -> None:
    """Logits of documents packed into one row are those of each document alone, in both model styles."""
    documents = document_ids(tokenizer, ["A wool hat.", "The parcel is late, sorry about that.", "Fine"])
    examples = [(ids, list(ids)) for ids in documents]
    collate = BlockCollator(tokenizer.pad_token_id)
    packed = collate([join_examples(examples), join_examples(examples[:1])])
    with torch.no_grad():
        together = tiny_lm(input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False).logits
        start = 0
        for ids in documents:
            alone = tiny_lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            torch.testing.assert_close(together[0, start : start + len(ids)], alone, atol=2e-5, rtol=2e-5)
            start += len(ids)
        torch.testing.assert_close(
            together[1, : len(documents[0])], together[0, : len(documents[0])], atol=2e-5, rtol=2e-5
        )
    assert packed["labels"][1, len(documents[0]) :].eq(IGNORE).all()


def test_no_example_predicts_the_next_ones_first_token() -> None:
    row = join_examples([([5, 6, 7], [5, 6, 7]), ([8, 9], [8, 9])])
    assert row == {"input_ids": [5, 6, 7, 8, 9], "position_ids": [0, 1, 2, 0, 1], "labels": [IGNORE, 6, 7, IGNORE, 9]}


def test_ranking_batch_by_hand() -> None:
    def pair(better: int, worse: int, target: float = 1.0, tie: bool = False) -> dict[str, Any]:
        return {"better": better, "worse": worse, "target": target, "tie": tie}

    rows = [
        {"ids": [[5], [6, 7]], "pairs": [pair(1, 0, 0.9)], "margin": 0.5, "weight": 2.0},
        {"ids": [[8], [9], [4, 4, 4]], "pairs": [pair(0, 2), pair(0, 1, 0.5, True)], "margin": 0.0, "weight": 1.0},
    ]
    batch = RankingCollator(0)(rows)
    assert batch["input_ids"].tolist() == [[5, 0, 0], [6, 7, 0], [8, 0, 0], [9, 0, 0], [4, 4, 4]]
    assert batch["attention_mask"].sum(1).tolist() == [1, 2, 1, 1, 3]
    assert batch["better"].tolist() == [1, 2, 2]
    assert batch["worse"].tolist() == [0, 4, 3]
    assert batch["target"].tolist() == pytest.approx([0.9, 1.0, 0.5])
    assert batch["tie"].tolist() == [False, False, True]
    assert batch["margin"].tolist() == [0.5, 0.0, 0.0]
    assert batch["pair_weight"].tolist() == [2.0, 0.5, 0.5]
    assert batch["prompts"] == 2
