"""Bugs that other people's models, templates, devices and files brought to light, and those of lineage, report and plan."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from mutations import mutation
from pipeline.data.encoding import ChatEncoder
from pipeline.errors import UserError
from pipeline.models.loading import load_causal_lm
from pipeline.rollout.engine import CachedDecoder

import numpy as np
import torch

TRIALS, LOADING, PRECISION = "pipeline.models.trials:", "pipeline.models.loading:", "pipeline.models.precision:"
TOKENS, TEMPLATES, LOADED = (
    "tests/models/test_tokenizers.py::",
    "tests/models/test_templates.py::",
    "tests/models/test_loading.py::",
)
PACKED, LORA, STAGE_DATA = (
    "tests/models/test_packed.py::",
    "tests/models/test_lora.py::",
    "tests/stages/test_stage_data.py::",
)
INPUTS, REWARDS, REPORT = (
    "tests/data/test_inputs.py::",
    "tests/rollout/test_rewards.py::",
    "tests/evaluation/test_report.py::",
)
VERDICT, REWARD_MODEL = "tests/evaluation/test_verdict.py::", "tests/evaluation/test_reward_model.py::"
FOLDER, LINEAGE = "tests/training/test_output_folder.py::", "tests/training/test_lineage.py::"

# fmt: off
# ---------------------------------------------------------------------------------------------- models

@mutation("documents that share a row see each other", TRIALS + "_isolates", PACKED + "test_documents_that_see_each_other_in_a_packed_row_are_noticed")
def _(original: Any, model: Any) -> bool:
    return True

@mutation("SFT packs whatever the model", TRIALS + "isolates_packed_documents", STAGE_DATA + "test_packed_examples_that_would_see_each_other_get_a_row_each")
def _(original: Any, model: Any) -> bool:
    return True

@mutation("PPO packs pretraining text whatever the model", TRIALS + "_isolates", STAGE_DATA + "test_text_for_ptx_that_would_see_its_neighbours_gets_a_block_each")
def _(original: Any, model: Any) -> bool:
    return True

@mutation("the report packs text whatever the model", TRIALS + "isolates_packed_documents", "tests/evaluation/test_alignment_tax.py::test_the_reports_perplexity_is_that_of_pretraining")
def _(original: Any, model: Any) -> bool:
    return True

@mutation("packed attention is tried on rows that are shorter than the window", "pipeline.models.shrink:with_few_layers", PACKED + "test_attention_in_chunks_longer_than_the_trial_stays_padded")
def _(original: Any, config: Any, window: int) -> Any:
    return original(config, 512)

@mutation("linear layers are known by the name of their class", PRECISION + "is_linear", "tests/models/test_precision.py::test_linear_layers_are_known_by_type")
def _(original: Any, module: Any) -> bool:
    return type(module).__name__ == "Linear"

@mutation("emulated bf16 counts", PRECISION + "has_bf16", "tests/models/test_precision.py::test_emulated_bf16_does_not_count")
def _(original: Any, device_type: str) -> bool:
    return torch.cuda.is_bf16_supported()

@mutation("a router's noise stays on", LOADING + "disable_noise", LOADED + "test_nothing_is_random_in_training_mode")
def _(original: Any, model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

@mutation("a mixture of experts never gets its loss", "pipeline.models.experts:set_router_loss", "tests/models/test_experts.py::test_the_loss_is_added_with_its_weight_over_the_passes_of_a_step")
def _(original: Any, model: Any, weight: Any, forward_passes: int) -> None:
    return None

@mutation("the router's outputs stay on in the saved config", LOADING + "keep_router_logits_off", LOADED + "test_router_logits_are_never_left_on")
def _(original: Any, model: Any) -> None:
    pass

@mutation("weights that a folder lacks are drawn at random", LOADING + "_check_weights", LOADED + "test_weights_that_a_folder_lacks_are_never_drawn_at_random")
def _(original: Any, model: Any, path: str, report: Any, new_head: bool) -> None:
    pass

@mutation("values that cannot be saved stay in the generation config", LOADING + "_mend_generation_config", LOADED + "test_a_generation_config_that_cannot_be_saved_is_mended")
def _(original: Any, model: Any, path: str) -> None:
    pass

@mutation("LoRA trains a table that is tied", "pipeline.models.lora:_is_tied", LORA + "test_a_tied_table_is_no_target")
def _(original: Any, model: Any) -> bool:
    return False

@mutation("scores are rounded to bf16 before the offset is taken off", "pipeline.models.reward_model:apply_head", REWARDS + "test_scores_far_from_zero_keep_their_digits_under_autocast")
def _(original: Any, model: Any, hidden: Any) -> Any:
    return original(model, hidden).bfloat16().float()

@mutation("reward functions compute inside autocast", "pipeline.rollout.rewards:call_function", REWARDS + "test_functions_are_not_rounded_to_bf16")
def _(original: Any, *rest: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return [float(torch.tensor(score).bfloat16()) for score in original(*rest)]

# ---------------------------------------------------------------------------------------------- templates and tokens

@mutation("a base model's template has no start token", "pipeline.models.tokenizers:_plain_template", TEMPLATES + "test_a_base_model_gets_the_start_token_that_its_tokenizer_adds")
def _(original: Any, tokenizer: Any) -> str:
    return str(original(tokenizer)).replace("{{ bos_token }}", "")

@mutation("a template prints today's date", "pipeline.data.chat_template:freeze_date", TEMPLATES + "test_a_prompt_is_the_same_tomorrow")
def _(original: Any, template: str, date: Any) -> str:
    return template

@mutation("earlier answers of a dialogue end nowhere", "pipeline.data.encoding:ChatEncoder._ends_earlier_answers", TEMPLATES + "test_a_template_that_ends_the_last_answer_only_is_named")
def _(original: Any, self: ChatEncoder) -> bool:
    return True

@mutation("an answer ends at EOS, whatever the template writes", "pipeline.data.encoding:ChatEncoder._end_of_answer", TEMPLATES + "test_an_answer_follows_the_prompt_and_ends_where_the_template_ends_it")
def _(original: Any, self: ChatEncoder) -> int:
    return self.eos_id

@mutation("special tokens that are only in the added tokens are overlooked", "pipeline.data.control_tokens:special_token_ids", TOKENS + "test_special_tokens_that_are_only_in_the_added_tokens_are_forbidden_and_unread")
def _(original: Any, tokenizer: Any) -> set[int]:
    return set(tokenizer.all_special_ids)

@mutation("control tokens are special ones alone", "pipeline.data.control_tokens:control_token_ids", TOKENS + "test_markup_is_a_control_token_whether_or_not_the_template_writes_it_and_html_is_text")
def _(original: Any, tokenizer: Any) -> set[int]:
    return {token for token in tokenizer.all_special_ids if token is not None}

@mutation("control tokens in data act as control tokens", "pipeline.data.control_tokens:TextTokenizer.correct", TEMPLATES + "test_no_content_becomes_a_control_token")
def _(original: Any, self: Any, text: str, contents: Any, encoding: Any) -> Any:
    return original(self, text, contents, encoding) if encoding is None else (encoding.ids, encoding.offsets)

# ---------------------------------------------------------------------------------------------- data

@mutation("weights of datasets are ignored", "pipeline.data.mixing:mixture_indices", "tests/data/test_mixing.py::test_weights_are_shares_of_the_rows")
def _(original: Any, sizes: Any, weights: Any, seed: int) -> Any:
    return original(sizes, [None] * len(sizes), seed)

@mutation("weights of rankings are ignored", "pipeline.data.mixing:mixture_indices", STAGE_DATA + "test_weights_decide_the_rankings_of_an_epoch")
def _(original: Any, sizes: Any, weights: Any, seed: int) -> Any:
    return original(sizes, [None] * len(sizes), seed)

@mutation("weights of prompts are ignored", "pipeline.data.mixing:mixture_indices", STAGE_DATA + "test_prompts_are_drawn_by_weight_and_held_out_ones_never")
def _(original: Any, sizes: Any, weights: Any, seed: int) -> Any:
    return original(sizes, [None] * len(sizes), seed)

@mutation("a split of unknown name is trained on", "pipeline.data.splits:split_side", INPUTS + "test_a_split_of_unknown_name_is_an_error")
def _(original: Any, name: str) -> str:
    return "held out" if name == "test" else "training"

@mutation("the split of a plain file is ignored", "pipeline.data.sources:_of_split", INPUTS + "test_a_plain_files_split_selects_its_rows")
def _(original: Any, records: Any, split: str, where: str) -> Any:
    yield from records

@mutation("turns that are not to be learnt are learnt", "pipeline.data.messages:trained_turns", STAGE_DATA + "test_a_turn_that_is_not_to_be_learnt_has_no_label")
def _(original: Any, value: Any, messages: Any, name: str) -> list[bool]:
    return [message["role"] == "assistant" for message in messages]

@mutation("keys of messages that nobody reads are dropped in silence", "pipeline.data.messages:unread_message_keys", INPUTS + "test_tool_calls_are_refused_and_other_keys_of_messages_named")
def _(original: Any, row: Any) -> list[str]:
    return []

@mutation("the input of an instruction is dropped", "pipeline.data.layouts:_with_input", INPUTS + "test_forms_of_published_demonstrations")
def _(original: Any, instruction: Any, row: Any) -> Any:
    return instruction

@mutation("a map may call the loser chosen", "pipeline.data.layouts:_check_verdict", INPUTS + "test_a_map_that_calls_the_loser_chosen_is_refused_with_the_remedy")
def _(original: Any, row: Any, columns: Any) -> None:
    pass

@mutation("max_rows hides broken lines", "pipeline.data.records:RowReader.read", INPUTS + "test_max_rows_hides_no_broken_line")
def _(original: Any, self: Any, rows: Any, columns: Any = None, max_rows: int | None = None) -> Any:
    if max_rows is not None:
        self.refused.refuse = lambda: None
    yield from original(self, rows, columns, max_rows)

@mutation("a list of messages written as text is text", "pipeline.data.messages:refuse_written_list", INPUTS + "test_a_list_of_messages_that_was_written_as_text_is_no_text")
def _(original: Any, text: str, name: str) -> None:
    pass

@mutation("a card may read files outside its folder", "pipeline.data.cards:_is_inside", "tests/data/test_hostile.py::test_a_hostile_card_is_refused_in_one_line")
def _(original: Any, file: Any, folder: Any) -> bool:
    return True

# ---------------------------------------------------------------------------------------------- lineage and resume

@mutation("config.json is in no hash", "pipeline.training.identity:config_sha256", "tests/training/test_identity.py::test_everything_that_changes_a_models_results_changes_its_identity")
def _(original: Any, folder: Any) -> str:
    return ""

@mutation("adapter/ is in no hash", "pipeline.training.identity:adapter_sha256", "tests/training/test_identity.py::test_everything_that_changes_a_models_results_changes_its_identity")
def _(original: Any, folder: Any) -> str:
    return ""

@mutation("a reward model of other scores is the same parent", "pipeline.training.identity:config_sha256", "tests/training/test_identity.py::test_other_scores_of_the_same_weights_are_another_run")
def _(original: Any, folder: Any) -> str:
    return ""

@mutation("a damaged checkpoint is resumed from", "pipeline.training.checkpoints:valid_manifest", FOLDER + "test_only_the_newest_whole_checkpoint_resumes")
def _(original: Any, checkpoint: Any) -> Any:
    from pipeline.training.checkpoints import MANIFEST, Manifest

    return Manifest.read(checkpoint) if (checkpoint / MANIFEST).exists() else None

@mutation("weights have the mode 0600", "pipeline.training.output_folder:share_file_modes", FOLDER + "test_files_have_the_users_mode")
def _(original: Any, folder: Any, like: Any) -> None:
    pass

@mutation("metrics hold NaN, which is no JSON", "pipeline.training.json_files:finite_or_null", FOLDER + "test_metrics_are_json_whatever_was_measured")
def _(original: Any, value: Any) -> Any:
    return {key: str(item) for key, item in value.items()} if isinstance(value, Mapping) else value

@mutation("a folder copied without hidden files is foreign", "pipeline.training.output_folder:holds_a_run", FOLDER + "test_a_folder_copied_without_hidden_files_is_known")
def _(original: Any, folder: Any) -> bool:
    return any(folder.glob(".*"))

@mutation("the card has no base_model", "pipeline.training.lineage:_base_model", LINEAGE + "test_the_base_model_is_handed_down")
def _(original: Any, lineage: Any) -> None:
    return None

# ---------------------------------------------------------------------------------------------- report and plan

@mutation("the report samples with other stop tokens than PPO", "pipeline.evaluation.answers:sampling_settings", "tests/evaluation/test_answers.py::test_the_reports_sampling_is_that_of_ppo")
def _(original: Any, model: Any, encoder: Any, ppo_recipe: Any) -> Any:
    return original(model, encoder, {**ppo_recipe, "stop_tokens": []})

@mutation("best of n takes the unfinished", "pipeline.rollout.best_of_n:best_of_n", "tests/rollout/test_best_of_n.py::test_a_finished_sample_is_taken_where_there_is_one")
def _(original: Any, *rest: Any, finished_first: bool = False, **options: Any) -> Any:
    return original(*rest, **options)

@mutation("over-optimisation is found in noise", "pipeline.evaluation.over_optimisation:_p_value", "tests/evaluation/test_over_optimisation.py::test_a_flat_judge_is_flagged_in_one_run_of_twenty_at_most")
def _(original: Any, *rest: Any, **options: Any) -> float:
    return 0.0

@mutation("a rate at equal length where lengths do not overlap", "pipeline.evaluation.intervals:_separated", "tests/evaluation/test_intervals.py::test_length_that_tells_wins_from_losses_identifies_no_rate")
def _(original: Any, a: Any, b: Any) -> bool:
    return False

@mutation("intervals of accuracy resample rankings", "pipeline.evaluation.reward_model:_prompt_numbers", REWARD_MODEL + "test_rankings_of_one_prompt_are_one_prompt")
def _(original: Any, rows: Any) -> Any:
    return np.arange(len(rows))

@mutation("calibration of a model of ties without its margin", "pipeline.evaluation.calibration:preference_logits", REWARD_MODEL + "test_a_true_model_of_ties_is_calibrated_by_its_own_probability")
def _(original: Any, margins: Any, tie_margin: float = 0.0) -> Any:
    return original(margins)

@mutation("a judge's first capital letter is its verdict", "pipeline.evaluation.llm_judge:choice_in", "tests/evaluation/test_llm_judge.py::test_replies_that_say_neither")
def _(original: Any, reply: str) -> str:
    match = re.search(r"\b[AB]\b", reply)
    return match[0] if match else str(original(reply))

@mutation("four prompts make a headline", "pipeline.evaluation.verdict:_limits", VERDICT + "test_few_prompts")
def _(original: Any, report: Any) -> list[Any]:
    return []

@mutation("a length bias is not said", "pipeline.evaluation.verdict:_length_bias", VERDICT + "test_length_bias_is_said")
def _(original: Any, bias: Any) -> list[Any]:
    return []

@mutation("lost perplexity is not said", "pipeline.evaluation.verdict:_tax", VERDICT + "test_perplexity_lost")
def _(original: Any, report: Any) -> list[Any]:
    return []

@mutation("a lost agreement with the independent judge is not said", "pipeline.evaluation.verdict:_agreement", VERDICT + "test_agreement_that_fell")
def _(original: Any, report: Any) -> list[Any]:
    return []

@mutation("a dialogue is its last turn", "pipeline.evaluation.answers:dialogue_text", "tests/evaluation/test_win_rates.py::test_a_dialogue_is_one_text")
def _(original: Any, messages: Any) -> Any:
    return messages[-1]["content"]

@mutation("the report runs code that the folder names", "pipeline.evaluation.judges:trusted_folders", REPORT + "test_code_that_only_the_folder_names_does_not_run")
def _(original: Any, run: Any, recipe_dir: Any = None) -> list[Any]:
    return [*original(run, recipe_dir), run, run.parent]

@mutation("a key goes unencrypted to any address", "pipeline.evaluation.chat_server:_api_key", "tests/evaluation/test_llm_judge.py::test_keys_travel_encrypted_or_stay_on_this_machine")
def _(original: Any, address: str, flag: str) -> Any:
    return original("https://" + address.partition("://")[2], flag)

@mutation("unfinished answers that pay are not warned of", "pipeline.rollout.alarms:warn_of_missing_eos_score", "tests/stages/test_ppo_details.py::test_a_missing_eos_score_above_finished_answers_is_warned_of")
def _(original: Any, samples: Any, args: Any) -> None:
    pass

@mutation("samples have the scores from before the missing-EOS rule", "pipeline.rollout.collect:ruled_scores", "tests/rollout/test_evaluation.py::test_samples_have_the_scores_of_the_mean")
def _(original: Any, samples: Any, args: Any) -> Any:
    return original([dataclasses.replace(sample, finished=True) for sample in samples], args)

@mutation("plan counts all experts of a mixture", "pipeline.planning.parameters:share_of_experts", "tests/planning/test_attention.py::test_a_mixture_of_experts_computes_with_the_experts_that_a_token_takes")
def _(original: Any, config: Any) -> float:
    return 1.0

@mutation("plan's cache is as wide as the hidden size", "pipeline.planning.attention:cache_bytes", "tests/planning/test_attention.py::test_the_cache_is_what_transformers_keeps")
def _(original: Any, config: Any, rows: int, length: int, bytes_each: int) -> float:
    text = config.get_text_config()
    return 2.0 * text.num_hidden_layers * text.hidden_size * rows * length * bytes_each

@mutation("plan's data-parallel PPO exchanges nothing", "pipeline.planning.memory:ppo_memory", "tests/planning/test_workload.py::test_data_parallel_ppo_exchanges_its_gradients")
def _(original: Any, *rest: Any) -> Any:
    memory = original(*rest)
    return dataclasses.replace(memory, parts={name: 0.0 if name == "exchange buffers" else size for name, size in memory.parts.items()})

# ---------------------------------------------------------------------------------------------- errors and what is refused

@mutation("finished rows leave every cache", "pipeline.rollout.engine:decoder_of", "tests/rollout/test_engine.py::test_hybrid_and_recurrent_models_sample_as_alone")
def _(original: Any, model: Any) -> Any:
    return CachedDecoder

@mutation("adapters: dropout of a reward adapter stays on", "pipeline.models.adapter_networks:AdapterNetworks.__init__", "tests/models/test_networks.py::test_the_dropout_of_a_reward_adapter_is_off")
def _(original: Any, self: Any, *rest: Any, **options: Any) -> None:
    original(self, *rest, **options)
    for module in self.peft.modules():
        for name in getattr(module, "lora_dropout", ()):
            module.lora_dropout[name] = torch.nn.Dropout(0.5)

@mutation("pad may end answers", "pipeline.models.tokenizers:require_pad", TOKENS + "test_pad_apart_from_eos_is_required")
def _(original: Any, *rest: Any) -> None:
    pass

@mutation("tokens beyond the embedding are taken", "pipeline.models.tokenizers:require_rows", LOADED + "test_tokens_beyond_the_embedding_get_rows_or_are_refused")
def _(original: Any, *rest: Any) -> None:
    pass

@mutation("a fault of many rows is told for each", "pipeline.data.problems:Problems.refuse", INPUTS + "test_a_fault_of_many_rows_is_told_once")
def _(original: Any, self: Any) -> None:
    if self.count:
        faults = [f"{self.source}:{line}: {message}" for message, lines in self.lines.items() for line in lines]
        raise UserError("\n".join(faults))

@mutation("a row that a template refuses is not named", "pipeline.data.records:at_row", STAGE_DATA + "test_a_template_that_refuses_a_role_names_the_row")
def _(original: Any, record: Any) -> Any:
    return contextlib.nullcontext()

@mutation("a row may be nested without end", "pipeline.data.files:check_object", "tests/data/test_hostile.py::test_a_hostile_row_is_read_or_refused_in_one_line")
def _(original: Any, row: Any, text: str) -> Any:
    return row

@mutation("a tilde is a folder", "pipeline.cli:_with_home", "tests/commands/test_cli.py::test_a_tilde_is_the_home_folder")
def _(original: Any, word: str) -> str:
    return word

@mutation("secrets are recorded", "pipeline.training.identity:without_secrets", FOLDER + "test_secrets_are_recorded_nowhere")
def _(original: Any, value: Any) -> Any:
    return value

@mutation("a lineage of any shape is read", "pipeline.training.lineage:_check_shape", LINEAGE + "test_a_damaged_lineage_is_one_line")
def _(original: Any, path: Any, lineage: Any) -> None:
    pass

@mutation("a full disk is a traceback", "pipeline.errors:describe_system_error", "tests/test_errors.py::test_a_full_disk_names_the_disk_and_what_is_free")
def _(original: Any, *rest: Any) -> None:
    return None

@mutation("a model that diverged answers in the report", "pipeline.evaluation.answers:load_finite_model", REPORT + "test_weights_that_are_not_finite_are_not_reported_as_answers")
def _(original: Any, folder: Any) -> Any:
    return load_causal_lm(str(folder)).eval()
# fmt: on
