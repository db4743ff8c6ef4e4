"""Small models, tokenizers and rows that stand in for what a check cannot have: a later parent, a remote one, a large one."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from pipeline.data.entries import DatasetEntry
from pipeline.errors import UserError
from pipeline.models.shrink import narrow
from pipeline.training.lineage import verify_parent
from pipeline.training.parent_names import is_hub_id, missing_parent
from pipeline.training.stage import ROOT

VOCABULARY = 512
ROWS = 48  # of each dataset
CARDS = {
    "document": "demo_corpus",
    "demonstration": "demo_demonstrations",
    "ranking": "demo_comparisons",
    "prompt": "demo_prompts",
}


def own_config(args: Any) -> Any:
    """The config of the stage's own model, where it is not an earlier stage's."""
    from pipeline.models.loading import new_config

    import transformers

    if getattr(args, "config_class", None) and args.parent is None:
        vocabulary = args.train_tokenizer.vocab_size if args.train_tokenizer else 32_000
        return new_config(args.config_class, args.model_config, vocab_size=vocabulary)
    if args.parent and Path(args.parent).is_dir():
        return transformers.AutoConfig.from_pretrained(args.parent)
    return None


def few_rows(entry: DatasetEntry, kind: str, data_root: str, warnings: list[str]) -> dict[str, Any]:
    """The first rows of a dataset; of a card's where the dataset is not here."""
    if entry.path and (path := Path(data_root) / entry.path).exists():
        values = {**dataclasses.asdict(entry), "path": str(path.resolve())}
        if path.suffix != ".txt":
            values["max_rows"] = min(entry.max_rows or ROWS, ROWS)
        return {key: value for key, value in values.items() if value is not None}
    where = entry.hub or str(Path(data_root) / str(entry.path))
    why = "is on the Hub" if entry.hub else "does not exist"
    warnings.append(f"dataset {where} {why}: its rows were not read, those of data_cards/{CARDS[kind]} stood in")
    return {"path": str(ROOT / "data_cards" / CARDS[kind]), "max_rows": ROWS}


@dataclasses.dataclass
class Parents:
    """Parents of a dry run: the outputs of its own stages, else small models of the parents' classes in `scratch`."""

    scratch: Path
    outputs: dict[str, Path] = dataclasses.field(default_factory=dict)  # recipe's output_dir → the dry run's
    made: int = 0

    def folder(self, path: str, stages: tuple[str, ...], warnings: list[str], *, scalar: bool = False) -> str:
        """Where the model at `path` is in the dry run.

        Args:
            scalar: it is a reward model.
        """
        if os.path.normpath(path) in self.outputs:
            return str(self.outputs[os.path.normpath(path)])
        if not Path(path).exists() and not is_hub_id(path):
            raise UserError(missing_parent(path))
        self.made += 1
        target = self.scratch / f"parent-{self.made}"
        config = self._config(path, target, warnings)
        if Path(path).is_dir() and (Path(path) / "lineage.json").exists():
            verify_parent(path, stages)
        save_shrunk(config, target, scalar=scalar)
        return str(target)

    def _config(self, path: str, target: Path, warnings: list[str]) -> Any:
        """The parent's config; its tokenizer, or one that stands in, is saved to `target`."""
        from pipeline.models.loading import CONFIG_ERRORS, one_line

        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(path)
        except CONFIG_ERRORS as error:
            if Path(path).exists():
                raise UserError(
                    f"parent {path!r}: {one_line(error)}; correct the folder, or run its stage again"
                ) from error
            warnings.append(
                f"{path} cannot be reached, so its class and tokenizer were not tried; a small Llama stood in"
            )
            stand_in_tokenizer(target)
            return transformers.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096)
        if Path(path).is_dir() and not any(Path(path).glob("*token*")):
            earlier = list(self.outputs.values())[-1:]
            whose = "an earlier stage's" if earlier else "one of the demo's corpus"
            warnings.append(f"{path} has no tokenizer; {whose} stood in")
            if earlier:
                transformers.AutoTokenizer.from_pretrained(earlier[0]).save_pretrained(target)
            else:
                stand_in_tokenizer(target)
            config.vocab_size = VOCABULARY
        else:
            transformers.AutoTokenizer.from_pretrained(path).save_pretrained(target)
        return config


def save_shrunk(config: Any, target: Path, *, scalar: bool) -> None:
    """A random, shrunk model of a config's class."""
    import transformers

    auto: Any = transformers.AutoModelForSequenceClassification if scalar else transformers.AutoModelForCausalLM
    small = narrow(config)
    architecture = (config.architectures or [""])[0]
    if "ForMaskedLM" in architecture or architecture.endswith("PreTraining"):
        auto = transformers.AutoModelForMaskedLM
    if scalar:
        small.num_labels = config.num_labels
    auto.from_config(small).save_pretrained(target)


def stand_in_tokenizer(target: Path) -> None:
    from pipeline.data.records import PARSERS, read_records
    from pipeline.models.tokenizer_training import train_tokenizer

    rows = read_records(ROOT / "data_cards" / "demo_corpus" / "train.jsonl", PARSERS["document"], 100)
    train_tokenizer([row["text"] for row in rows], VOCABULARY).save_pretrained(target)
