"""The identity of a model and of a run: the only place that decides whether two of them are the same.

A model is its weights, config.json (with a reward model's offset), adapter, stop tokens, tokenizer and chat template.
A run is its stage, its recipe without the keys that change no result and without paths, and the content of what it reads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.data.hashing import sha256_file, sha256_json
from pipeline.errors import UserError
from pipeline.training.json_files import NotAnObject, read_json_object

# Keys of a recipe that say where a run writes, how it talks or where something lies; they change no result.
# The content of what lies at `parent`, `reference` and `tokenizer` is among a run's inputs.
NOT_IDENTITY = (
    "output_dir", "data_root", "report_to", "run_name", "quiet", "threads", "keep_checkpoints", "save_steps", "parent",
    "reference", "tokenizer", "data_cache", "engine_url", "engine_weights", "engine_wait", "offload",
)  # fmt: skip
PATHS = ("path", "model")  # of entries of lists, such as `datasets` and `reward`
CONFIG_NOT_IDENTITY = ("_name_or_path", "transformers_version", "base_model_name_or_path")
SECRET_KEY = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|access_key|credentials?)$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\b(hf_\w{20,}|sk-[\w-]{20,})|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
REDACTED = "<redacted>"
# Texts on which tokenizers of one vocabulary differ: cases, accents, digits, spaces, line ends, other scripts, emoji.
PROBES = (
    "Hello world", "  two  spaces ", "a\n\nb\tc\r\n", "don't I'LL", "1234567890 3.14", "naïve café ﬁ Å", "日本語 мир مرحبا",
    "👍🏽 🇩🇪", "x=[{'a': 1}];//", "<|im_end|> </s> <s>[INST]", "",
)  # fmt: skip
ADDED_TOKEN_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


# ---------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class ModelIdentity:
    """Hashes of a model folder's files."""

    weights_sha256: str
    config_sha256: str
    adapter_sha256: str | None
    stop_tokens: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "stop_tokens": list(self.stop_tokens)}


def model_identity(folder: Path) -> ModelIdentity:
    """Identify the model in a folder by its files.

    Raises:
        UserError: a file is missing or has another shape than transformers writes.
    """
    return ModelIdentity(weights_sha256(folder), config_sha256(folder), adapter_sha256(folder), stop_tokens(folder))


def weights_sha256(folder: Path) -> str:
    """One hash over every safetensors file of a folder, in the order of their names."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError("no *.safetensors weights here; convert them with save_pretrained of transformers", file=folder)
    return _files_sha256(files)


def config_sha256(folder: Path) -> str:
    """Hash of config.json without the keys that say where and by which version it was written."""
    return _settings_sha256(folder / "config.json")


def adapter_sha256(folder: Path) -> str | None:
    """Hash of the configuration and weights in `adapter/`, or None where there is none."""
    config = folder / "adapter" / "adapter_config.json"
    if not config.is_file():
        return None
    weights = sorted((folder / "adapter").glob("*.safetensors"))
    return sha256_json([_settings_sha256(config), _files_sha256(weights)])


def stop_tokens(folder: Path) -> tuple[int, ...]:
    """The ids that end a response by generation_config.json, ascending."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    ids = _read_settings(path).get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise UserError("eos_token_id is neither a token id nor a list of them; correct it", file=path)
    return tuple(sorted(set(ids)))


def _files_sha256(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except NotAnObject as error:
        raise UserError(f"{error}; restore the file", file=path) from error


def _settings_sha256(path: Path) -> str:
    return sha256_json({k: v for k, v in _read_settings(path).items() if k not in CONFIG_NOT_IDENTITY})


# ---------------------------------------------------------------------------------------------- tokenizers


def tokenizer_hashes(tokenizer: Any) -> tuple[str, str]:
    """Hashes of what a tokenizer does, and of its chat template.

    What it does is its vocabulary, merges, scores, added and special tokens, and the ids and texts of a few probes: not
    the JSON it is stored in, to which another version of tokenizers may add fields.
    """
    return sha256_json(_tokenizer_behaviour(tokenizer)), sha256_json(tokenizer.chat_template)


def _tokenizer_behaviour(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    stored = json.loads(backend.to_str()) if backend is not None else {}
    model = stored.get("model") or {}
    merges = [pair.split(" ", 1) if isinstance(pair, str) else list(pair) for pair in model.get("merges") or []]
    scores = model["vocab"] if isinstance(model.get("vocab"), list) else None  # of a unigram model
    added = {str(id): [getattr(t, flag) for flag in ADDED_TOKEN_FLAGS] for id, t in _added_tokens(tokenizer).items()}
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    probes = [_probe(tokenizer, text) for text in PROBES]
    return {
        "vocabulary": tokenizer.get_vocab(), "merges": merges, "scores": scores, "added": added, "special": special,
        "probes": probes,
    }  # fmt: skip


def _added_tokens(tokenizer: Any) -> Mapping[int, Any]:
    return getattr(tokenizer, "added_tokens_decoder", None) or {}


def _probe(tokenizer: Any, text: str) -> Any:
    """[ids, their text]; a tokenizer without an unknown token may refuse a text, which is behaviour too."""
    try:
        ids = tokenizer(text)["input_ids"]
        return [list(ids), tokenizer.decode(ids)]
    except Exception as error:  # the tokenizers library raises plain Exceptions
        return type(error).__name__


def same_tokenizer(tokenizer: Any, recorded: str) -> bool:
    """Whether a tokenizer is the one that was recorded, by today's hash or by that of lineages before it."""
    return recorded in (tokenizer_hashes(tokenizer)[0], _former_tokenizer_sha256(tokenizer))


def _former_tokenizer_sha256(tokenizer: Any) -> str:
    """The hash over the stored JSON, which lineages held before: right while tokenizers stores the same fields."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    behaviour: Any = tokenizer.get_vocab()
    if backend is not None:
        behaviour = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return sha256_json([behaviour, special])


# ---------------------------------------------------------------------------------------------- runs


def run_fingerprint(stage: str, recipe: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """The identity of a run: a hash of stage, recipe, and the content of models, data and functions."""
    return sha256_json([stage, recipe_identity(recipe), inputs])


def recipe_identity(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a recipe that decides the result: models and data count by content, not by where they lie."""
    identifying = {key: value for key, value in recipe.items() if key not in NOT_IDENTITY}
    return {key: [_without_paths(entry) for entry in v] if isinstance(v, list) else v for key, v in identifying.items()}


def _without_paths(entry: Any) -> Any:
    return {key: None if key in PATHS else value for key, value in entry.items()} if isinstance(entry, dict) else entry


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Names of the entries that differ between two nested dicts."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [name] if ours != theirs else []
    differing = []
    for key in sorted(ours.keys() | theirs.keys(), key=str):
        differing += differences(ours.get(key), theirs.get(key), f"{name} {key}".strip())
    return differing


def without_secrets(value: Any) -> Any:
    """The same data with passwords, tokens and keys replaced: what is recorded may be shared."""
    if isinstance(value, dict):
        return {
            key: REDACTED if item is not None and SECRET_KEY.search(str(key)) else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return SECRET_VALUE.sub(REDACTED, value) if isinstance(value, str) else value


def as_inputs(identity: ModelIdentity, tokenizer: Any) -> dict[str, Any]:
    """A model's identity as an entry of a run's inputs."""
    own, template = tokenizer_hashes(tokenizer)
    return {**identity.as_json(), "tokenizer": own, "chat_template": template}
