"""The data cache: what stages have read and encoded, in folders named by all that decides their content.

An entry is built in a folder beside its place, sealed by a JSON file that is written last, and renamed in. Its lock lets
one process build while the others wait. What a killed process leaves is never read, and the next builder removes it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.data.hashing import sha256_json
from pipeline.data.notes import Note, collected_notes, say
from pipeline.data.progress import SECONDS_BETWEEN_LINES
from pipeline.errors import UserError

from filelock import FileLock, Timeout

logger = logging.getLogger("pipeline.progress")
VARIABLE = "RLHF_DATA_CACHE"
SEAL = "entry.json"
LOCKS = "locks"
LIBRARIES = ("tokenizers", "transformers", "pyarrow")  # their versions decide an entry's content too
ANOTHER = f"free some space there or name another folder as `data_cache:` or in ${VARIABLE}"
_MARK = "\x00"  # stands for the data file's path, which is no part of the content


@dataclass(frozen=True)
class Entry:
    """One sealed entry. facts: what its builder returned. used: when a stage last asked for it, seconds since 1970."""

    folder: Path
    what: str
    facts: dict[str, Any]
    files: dict[str, int]  # name → bytes
    notes: list[Note]
    used: float

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


def open_entry(folder: Path) -> Entry | None:
    """The entry in a folder, or None where there is none that is whole."""
    seal = folder / SEAL
    try:
        found = json.loads(seal.read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in found["files"].items())
        used = seal.stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError):
        return None
    notes = [(name, level, text) for name, level, text in found["notes"]]
    return Entry(folder, found["what"], found["facts"], found["files"], notes, used) if whole else None


@functools.cache
def code_version() -> str:
    """Hash of the code that reads and encodes, and of its libraries' versions."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    digest.update(repr([version(name) for name in LIBRARIES]).encode())
    return digest.hexdigest()


class DataCache:
    """The cache in a folder: `data_cache:` of a recipe, else $RLHF_DATA_CACHE, else `rlhf-pipeline/data` of the user's."""

    def __init__(self, root: str | os.PathLike[str] | None = None):
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf-pipeline" / "data"
        self.root = Path(root or os.environ.get(VARIABLE) or default).expanduser().absolute()

    def entry(
        self,
        what: str,
        identity: dict[str, Any],
        build: Callable[[Path], dict[str, Any]],
        *,
        file: str = "",
    ) -> Entry:
        """The entry of this identity, built if it is not there; what its builder logged is said in either case.

        Args:
            what: shown by `rlhf cache`, and to those who wait.
            identity: plain data, all that decides the content besides the code.
            build: fills a folder and returns plain data to keep beside its files.
            file: path of the data in log lines, which may differ from one start to the next.

        Raises:
            UserError: the cache cannot be written, or whatever `build` raises.
        """
        key = sha256_json({**identity, "code": code_version()})
        entry = open_entry(self.root / key)
        if entry is None:
            with self._locked(key, what):
                entry = open_entry(self.root / key) or self._build(key, what, build, file)
        else:
            with contextlib.suppress(OSError):  # a cache that may only be read
                os.utime(entry.folder / SEAL)
        say([(name, level, text.replace(_MARK, file)) for name, level, text in entry.notes])
        return entry

    def entries(self) -> Iterator[Entry]:
        for seal in sorted(self.root.glob(f"*/{SEAL}")):
            if entry := open_entry(seal.parent):
                yield entry

    def clear(self, older_than: float = 0.0) -> tuple[int, int]:
        """Remove the entries that no stage has asked for since `older_than` seconds, and what killed builders left.

        Returns:
            entries removed, their bytes.
        """
        removed = freed = 0
        for folder in [path for path in self.root.glob("*") if path.is_dir() and len(path.name.split(".")[0]) == 64]:
            key, entry = folder.name.split(".")[0], open_entry(folder)
            if entry and time.time() - entry.used < older_than:
                continue
            lock = FileLock(self.root / LOCKS / key)
            with contextlib.suppress(Timeout), lock.acquire(timeout=0):  # one that is being built stays
                removed, freed = removed + (entry is not None), freed + (entry.bytes if entry else 0)
                shutil.rmtree(folder)
        return removed, freed

    # ------------------------------------------------------------------------------------------ building

    @contextlib.contextmanager
    def _locked(self, key: str, what: str) -> Iterator[None]:
        with self._refusing():
            (self.root / LOCKS).mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / LOCKS / key)
            started = time.monotonic()
            while True:
                try:
                    lock.acquire(timeout=SECONDS_BETWEEN_LINES)
                    break
                except Timeout:
                    waited = time.monotonic() - started
                    logger.info("waiting for another process, which writes %s to the data cache (%.0f s)", what, waited)
        try:
            yield
        finally:
            lock.release()

    def _build(self, key: str, what: str, build: Callable[[Path], dict[str, Any]], file: str) -> Entry:
        temporary = self.root / f"{key}.building"
        try:
            with self._refusing():
                shutil.rmtree(temporary, ignore_errors=True)  # of a builder that was killed
                shutil.rmtree(self.root / key, ignore_errors=True)  # one that is not whole
                temporary.mkdir()
                with collected_notes() as collected:
                    facts = build(temporary)
                notes = [(name, level, text.replace(file, _MARK) if file else text) for name, level, text in collected]
                files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
                seal = {"what": what, "facts": facts, "files": files, "notes": notes}
                for path in sorted(temporary.iterdir()):
                    _sync(path)
                (temporary / SEAL).write_text(json.dumps(seal, ensure_ascii=False), encoding="utf-8")
                _sync(temporary / SEAL)
                _sync(temporary)
                temporary.rename(self.root / key)
                _sync(self.root)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        entry = open_entry(self.root / key)
        assert entry is not None
        logger.info("%s: %s in the data cache %s", what, readable(entry.bytes), self.root)
        return entry

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Say in one line that the cache cannot be written."""
        try:
            yield
        except (OSError, NotImplementedError) as error:
            number = getattr(error, "errno", None)
            if number in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"the disk of the data cache {str(self.root)!r} is full; {ANOTHER}") from error
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"the data cache {str(self.root)!r} cannot be written ({reason}); {ANOTHER}") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def readable(size: int) -> str:
    """Bytes in the unit that suits: 12.3 MB."""
    amount, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
