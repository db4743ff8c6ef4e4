"""What people write in `parent:` that is no model folder of ours: Hub ids, addresses, adapters."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pipeline.errors import UserError

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def is_hub_id(path: str) -> bool:
    """Whether a name that is no folder here can be a model on the Hub: `gpt2`, `owner/name`.

    Raises:
        UserError: it is an address.
    """
    if "://" in path:
        name = "/".join(path.split("://")[1].rstrip("/").split("/")[1:3])
        raise UserError(f"parent {path!r} is an address; name the Hub id alone{f', {name!r}' if name else ''}")
    return HUB_ID.fullmatch(path) is not None and not path.startswith("runs/")


def missing_parent(path: str) -> str:
    """What is said of a parent that is neither a folder here nor a name on the Hub."""
    return f"parent {path!r} does not exist; run the stage that writes it first, or correct `parent:`"


def check_no_adapter(folder: Path) -> None:
    """Refuse a folder that holds an adapter alone, with the way to a whole model.

    Raises:
        UserError: `folder` holds adapter_config.json and no config.json.
    """
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return
    if (folder.parent / "config.json").is_file() and folder.name == "adapter":
        raise UserError(f"parent {str(folder)!r} is an adapter; its merged model is {str(folder.parent)!r}, name that")
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    of = f" of {base!r}" if isinstance(base, str) else ""
    raise UserError(
        f"parent {str(folder)!r} is an adapter{of}, no whole model; merge it first: "
        f"AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained(FOLDER) of peft, "
        "then save the tokenizer to FOLDER too"
    )
