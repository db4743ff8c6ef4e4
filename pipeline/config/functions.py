"""Python functions that a recipe names as `module:function`: rewards, judges, the noiseless preferences of a simulation."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.data.hashing import sha256_file
from pipeline.errors import UserError

RewardFunction = Callable[[list[str], list[str], list[dict[str, Any]]], list[float]]
ROOT = Path(__file__).resolve().parent.parent.parent


def import_function(name: str) -> RewardFunction:
    """`module:function`, looked for in the recipe's folder, the current folder, and those of the recipes that ship."""
    module_name, _, attribute = name.partition(":")
    import_from(Path.cwd(), *sorted({file.parent for file in (ROOT / "recipes").glob("*/*.py")}))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"function {name!r}: module {module_name!r} cannot be imported ({error}); "
            "put it in the recipe's folder, the current folder or an installed package"
        ) from error
    except Exception as error:  # the user's own module, whatever it raises
        raise UserError(f"function {name!r}: module {module_name!r} fails when it is imported: {error!r}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"function {name!r}: {module_name!r} has no function {attribute!r}")
    return function  # type: ignore[no-any-return]


def import_from(*folders: Path) -> None:
    """Make the folders' modules importable, after whatever is so already."""
    for folder in folders:
        if str(folder.resolve()) not in sys.path:
            sys.path.append(str(folder.resolve()))


def source_sha256(function: RewardFunction) -> str | None:
    """Hash of the file that a function comes from: another file is another reward."""
    file = getattr(sys.modules.get(function.__module__), "__file__", None)
    return sha256_file(Path(file)) if file and Path(file).is_file() else None
