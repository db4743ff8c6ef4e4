"""`rlhf sample`: several answers to each prompt of a file, for labelers; killed and started again, it goes on where it was."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

ROWS = 64  # prompts that are answered and written together
MOST_ANSWERS = 26  # that the labeling page has letters for


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """The flags of `rlhf sample`. temperatures: one of all models, or one per model."""

    prompts: str
    output: str
    models: Sequence[str]
    temperatures: Sequence[float] = (1.0,)
    number: int = 4
    max_response_tokens: int = 64
    stop_tokens: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.number <= MOST_ANSWERS:
            raise UserError(f"command line: -k {self.number}; labelers compare 2 to {MOST_ANSWERS} answers")
        if self.number < len(self.models):
            raise UserError(f"command line: {len(self.models)} models share {self.number} answers; raise -k")
        if len(self.temperatures) not in (1, len(self.models)):
            raise UserError(
                f"command line: {len(self.temperatures)} temperatures for {len(self.models)} models; give one, or one each"
            )
        if not all(0.001 <= temperature <= 100 for temperature in self.temperatures):
            raise UserError("command line: a temperature lies between 0.001 and 100")
        if self.max_response_tokens < 1:
            raise UserError("command line: --max-response-tokens must be above 0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", metavar="PROMPTS", help="file with a column `prompt`")
    parser.add_argument(
        "--model",
        required=True,
        action="append",
        metavar="MODEL",
        help="folder of a stage, other folder, Hub id, or URL#NAME of an OpenAI-compatible server; may be given again: "
        "they answer in turn",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="JSONL of prompt, responses, sources")
    parser.add_argument("-k", type=int, default=4, help="answers sampled per prompt, over all models (default: 4)")
    parser.add_argument("--temperature", nargs="+", type=float, default=[1.0], help="of all models, or one per model")
    parser.add_argument("--max-response-tokens", type=int, default=64, help="longest response")
    parser.add_argument("--stop-tokens", nargs="+", default=[], help="further tokens that end a response")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")


def run(args: argparse.Namespace) -> int:
    from pipeline.training.logs import quiet_libraries

    quiet_libraries()
    sample_file(
        SampleOptions(
            prompts=args.prompts,
            output=args.output,
            models=args.model,
            temperatures=args.temperature,
            number=args.k,
            max_response_tokens=args.max_response_tokens,
            stop_tokens=args.stop_tokens,
            seed=args.seed,
        )
    )
    return 0


def sample_file(options: SampleOptions) -> int:
    """Write one row per prompt with at least two different answers; returns how many.

    `OUTPUT.state.json` holds what the rows are answers of, and how far they go: it is written after the rows, so that a
    start after a kill cuts off what it does not vouch for.

    Raises:
        UserError: bad prompts or models, before anything is sampled; an output of another request; a server that is gone.
    """
    from pipeline.data.hashing import sha256_file
    from pipeline.data.records import PARSERS, read_records
    from pipeline.evaluation.answer_sets import Counts, SamplingRequest, answer_sets, load_answerer

    source, target = Path(options.prompts), Path(options.output)
    if not source.is_file():
        raise UserError("does not exist", file=source)
    if target.resolve() == source.resolve():
        raise UserError("--output is the input; name another file", file=target)
    records = read_records(source, PARSERS["prompt"])
    temperatures = list(options.temperatures) * (len(options.models) if len(options.temperatures) == 1 else 1)
    request = SamplingRequest(options.max_response_tokens, options.seed, options.stop_tokens)
    answerers = [load_answerer(name, t, request) for name, t in zip(options.models, temperatures, strict=True)]
    sampling = {"answers": options.number, **dataclasses.asdict(request)}
    models = [answerer.identity for answerer in answerers]
    identity = {"prompts": sha256_file(source), "models": models, "sampling": sampling}
    state = _State.open(target, json.loads(json.dumps(identity)))
    counts = Counts(**{**state.counts, "failures": Counter(state.counts.get("failures", {}))})
    for start in range(state.prompts, len(records), ROWS):
        part = records[start : start + ROWS]
        rows = range(start, start + len(part))
        sets = answer_sets(answerers, part, rows, number=options.number, counts=counts)
        state.add(
            target, [{**row, "sampling": sampling} for row in sets], start + len(part), dataclasses.asdict(counts)
        )
    if not counts.rows:
        raise UserError("no prompt got two different answers; raise -k or --temperature", file=target)
    print(f"sample: {_summary(counts, len(records))} in {target}")
    return counts.rows


def _summary(counts: Any, prompts: int) -> str:
    kinds = ("duplicates", "empty", "failed")
    left = [f"{getattr(counts, kind):,} {kind}" for kind in kinds if getattr(counts, kind)]
    return (
        f"{counts.rows:,} of {prompts:,} prompts with {counts.answers - sum(getattr(counts, k) for k in kinds):,} answers"
        + (f"; left out: {', '.join(left)}" if left else "")
        + (f"; {counts.left_out:,} prompts with fewer than two different answers" if counts.left_out else "")
        + (f"; {counts.unfinished:,} answers without a stop token" if counts.unfinished else "")
        + "".join(f"; {number} × {why}" for why, number in counts.failures.most_common(3))
    )


@dataclass
class _State:
    """How far an output goes. prompts: answered ones; size: bytes of their rows; counts: what became of all answers."""

    path: Path
    identity: dict[str, Any]
    prompts: int = 0
    size: int = 0
    counts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, target: Path, identity: dict[str, Any]) -> _State:
        """Where an earlier start got to, the rows cut there; the beginning where there was none.

        Raises:
            UserError: the file is not ours, or holds answers to another request.
        """
        from pipeline.training.json_files import NotAnObject, read_json_object

        path = target.with_name(target.name + ".state.json")
        if not path.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            state = cls(path, identity)
            state._write()
            target.touch()
            return state
        try:
            known = read_json_object(path)
            state = cls(path, **{key: known[key] for key in ("identity", "prompts", "size", "counts")})
        except (NotAnObject, KeyError, TypeError):
            raise UserError("was not written by rlhf sample; name another --output or remove it", file=target) from None
        if state.identity != identity:
            other = ", ".join(key for key in identity if state.identity.get(key) != identity[key])
            raise UserError(
                f"holds answers of another request ({other}); name another --output or remove it", file=target
            )
        if (target.stat().st_size if target.exists() else 0) < state.size:
            raise UserError("is shorter than what was written; remove it and its .state.json", file=target)
        if target.exists():
            os.truncate(target, state.size)
        return state

    def add(self, target: Path, rows: Sequence[dict[str, Any]], prompts: int, counts: dict[str, Any]) -> None:
        with target.open("ab") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
            self.size = file.tell()
        self.prompts, self.counts = prompts, counts
        self._write()

    def _write(self) -> None:
        from pipeline.training.json_files import write_json

        known = {key: getattr(self, key) for key in ("identity", "prompts", "size", "counts")}
        write_json(self.path, known)
