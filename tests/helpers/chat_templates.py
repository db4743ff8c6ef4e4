"""Chat templates in the styles of the families that people train, and tokenizers of the shapes that they come with."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LOOP = "{% for m in messages %}"
PROMPT = "{% if add_generation_prompt %}"
SYSTEM_FIRST = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
)
ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template and what its tokenizer brings: special tokens, control tokens that are not special, its EOS."""

    template: str
    special: tuple[str, ...] = ()
    ordinary: tuple[str, ...] = ()
    eos: str | None = None
    bos: str | None = None


FAMILIES = {
    "chatml": Family(
        LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT + "<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
    ),
    "chatml on a base": Family(
        LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT + "<|im_start|>assistant\n{% endif %}",
        ordinary=("<|im_start|>", "<|im_end|>"),
    ),
    "chatml with a default system prompt": Family(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        + LOOP
        + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        + PROMPT
        + "<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
    ),
    "gemma": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + LOOP
        + ALTERNATE
        + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        + PROMPT
        + "<start_of_turn>model\n{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
    ),
    "gemma 3": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first }}{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}" + PROMPT + "<start_of_turn>model\n{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
    ),
    "llama 2": Family(
        "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
        + ALTERNATE
        + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (s if loop.first else '') + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        bos="<s>",
    ),
    "llama 3": Family(
        "{{ bos_token }}"
        + LOOP
        + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        + PROMPT
        + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
    ),
    "llama 3.2 with a date": Family(
        "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}<|eot_id|>"
        + LOOP
        + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        + PROMPT
        + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
    ),
    "mistral": Family(
        "{{ bos_token }}"
        + LOOP
        + ALTERNATE
        + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]"),
        bos="<s>",
    ),
    "zephyr": Family(
        LOOP + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}" + PROMPT + "{{ '<|assistant|>\n' }}{% endif %}",
    ),
    "tulu": Family(
        LOOP
        + "{% if m.role == 'assistant' %}{{ '<|assistant|>\n' + m.content + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}"
        "{% else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}{% endfor %}" + PROMPT + "{{ '<|assistant|>\n' }}{% endif %}",
    ),
    "phi 3": Family(
        LOOP + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}" + PROMPT + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|end|>",),
    ),
    "qwen 3": Family(
        LOOP
        + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        + PROMPT
        + "<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        ("<think>", "</think>"),
        eos="<|im_end|>",
    ),
    "deepseek r1": Family(
        "{{ bos_token }}"
        + LOOP
        + "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + eos_token }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}" + PROMPT + "{{ '<｜Assistant｜><think>\n' }}{% endif %}",
        (),
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        bos="<｜begin｜>",
    ),
    "gpt-oss": Family(
        LOOP
        + "{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
        "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}" + PROMPT + "<|start|>assistant{% endif %}",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        eos="<|return|>",
    ),
    "glm": Family(
        "[gMASK]<sop>" + LOOP + "<|{{ m.role }}|>\n{{ m.content }}{% endfor %}" + PROMPT + "<|assistant|>\n{% endif %}",
        ("[gMASK]", "<sop>"),
    ),
    "vicuna": Family(
        "{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}"
        "{% endfor %}" + PROMPT + "{{ 'ASSISTANT:' }}{% endif %}",
    ),
    "parts only": Family(
        LOOP
        + "{{ m.role | capitalize }}: {% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n"
        "{% endfor %}" + PROMPT + "Assistant:{% endif %}",
        ("<end_of_utterance>",),
    ),
}  # fmt: skip


def with_family(tokenizer: Any, name: str) -> Any:
    """A copy of a tokenizer with a family's template and tokens."""
    family, changed = FAMILIES[name], copy.deepcopy(tokenizer)
    changed.add_special_tokens({"extra_special_tokens": list(family.special)}, replace_extra_special_tokens=False)
    changed.add_tokens(list(family.ordinary))
    for attribute in ("eos", "bos"):
        if token := getattr(family, attribute):
            changed.add_special_tokens({f"{attribute}_token": token})
    changed.chat_template = family.template
    return changed


def spaced_tokenizer(legacy: bool = False) -> Any:
    """SentencePiece's shape: a space mark before the first word, as Llama 2's and Mistral's tokenizers have.

    Args:
        legacy: the mark also follows each special token (a normalizer puts it there).
    """
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    lines = [
        "my kettle number 1 is broken, sorry about that",
        "we will send a new one to you now",
        "Hello and thanks: yes, of course.",
    ] * 5
    alphabet = list("\nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:!?'<>|/&;[]_")
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(lines, trainer)
    saved = json.loads(backend.to_str())
    saved["pre_tokenizer"]["split"] = False
    backend = Tokenizer.from_str(json.dumps(saved))
    if legacy:
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)
