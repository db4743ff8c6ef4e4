"""Log-probabilities of chosen tokens: those of whole logits, for every layout, chunking and change after the LM head."""

from __future__ import annotations

import copy
from typing import Any

from pipeline.algorithms.logprobs import tempered_logits, token_logprobs
from pipeline.models import language_model
from pipeline.models.language_model import LanguageModel
from pipeline.models.networks import response_batch
from pipeline.models.tokenizers import forbidden_token_ids
from pipeline.models.trials import enable_packed_attention

import pytest
import torch
import transformers

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]
RESPONSES = [[20, 21], [22, 23, 24, 25], [26]]
CPU = torch.device("cpu")


def expected_logprobs(model: Any, temperature: float, forbidden: list[int]) -> torch.Tensor:
    """Of every response alone, from the logits of its whole sequence."""
    parts = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        tempered = tempered_logits(logits, temperature, torch.tensor(forbidden))
        parts.append(token_logprobs(tempered, torch.tensor(response))[0])
    return torch.cat(parts)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunks", ["one", "small", "recomputed"])
def test_response_logprobs_and_their_gradients(
    tiny_lm: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, chunks: str, packed: bool
) -> None:
    if chunks == "recomputed":
        monkeypatch.setattr(language_model, "LOGITS_BYTES", 4 * len(tokenizer) * 2)
    if chunks == "small":
        monkeypatch.setattr(language_model, "FEWEST_ROWS", 3)
        monkeypatch.setattr(language_model, "CACHED_LOGITS", 3 * len(tokenizer))
    model = copy.deepcopy(tiny_lm)
    forbidden = forbidden_token_ids(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    policy = LanguageModel(model, 0.7, forbidden)
    assert not packed or enable_packed_attention(model)
    batch = response_batch(PROMPTS, RESPONSES, pad_id=1, packed=packed, score_after_response=False, device=CPU)
    where = (batch.sequences, batch.token_positions, batch.tokens)
    logprobs, entropy = policy(*where)
    alone, none = policy(*where, with_entropy=False)
    assert torch.equal(alone, logprobs)
    assert none is None
    assert logprobs.shape == (7,)
    assert (entropy > 0).all()
    whole = copy.deepcopy(tiny_lm)
    expected = expected_logprobs(whole, 0.7, forbidden)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    logprobs.sum().backward()
    expected.sum().backward()
    for (name, a), b in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=name)


SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TRANSFORMED = {
    "Gemma2Config": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "CohereConfig": {"logit_scale": 0.25},
    "GraniteConfig": {"logits_scaling": 4.0},
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_soft_capped_and_scaled_logits_are_trained_rightly(name: str) -> None:
    """The logits are the model's own, which differ from the LM head's output; the head still runs on chosen positions alone."""
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SIZES, **TRANSFORMED[name])
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    policy = LanguageModel(model, 1.0, [])
    assert policy.direct_head
    batch = response_batch(PROMPTS, RESPONSES, pad_id=0, packed=False, score_after_response=False, device=CPU)
    logprobs, _ = policy(batch.sequences, batch.token_positions, batch.tokens)
    torch.testing.assert_close(logprobs, expected_logprobs(model, 1.0, []), atol=1e-5, rtol=1e-5)
    states = model.base_model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False).last_hidden_state
    plain = model.get_output_embeddings()(states)
    assert (plain - model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False).logits).abs().max() > 0.1


def test_a_change_of_logits_that_is_not_known_takes_the_models_own_forward_pass(tiny_lm: Any) -> None:
    model = copy.deepcopy(tiny_lm)
    forward = model.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits**3
        return out

    model.forward = changed
    policy = LanguageModel(model, 1.0, [])
    assert not policy.direct_head
    batch = response_batch(PROMPTS, RESPONSES, pad_id=1, packed=False, score_after_response=False, device=CPU)
    logprobs, _ = policy(batch.sequences, batch.token_positions, batch.tokens)
    torch.testing.assert_close(logprobs, expected_logprobs(model, 1.0, []), atol=1e-5, rtol=1e-5)
    labels = torch.tensor([[-100, 6, 7]])
    nll = policy.text_nll(torch.tensor([[5, 6, 7]]), None, labels)
    logits = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits[0, :2]
    torch.testing.assert_close(nll, torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum"))


def test_a_head_of_another_width_takes_the_models_own_forward_pass() -> None:
    """RemBERT's head follows a layer that makes its states wider."""
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.RemBertConfig(
        **sizes, input_embedding_size=8, output_embedding_size=24, is_decoder=True, max_position_embeddings=32
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert not LanguageModel(model, 1.0, []).direct_head
