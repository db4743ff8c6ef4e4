"""`rlhf check DATA.jsonl`: what a file of comparisons holds, who judged it and how they agree, before anything is trained.

Imports little, for an answer in seconds: no torch unless tokens are to be counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.cards import card_columns, split_files
from pipeline.data.comparison_statistics import ComparisonStatistics, prompt_text
from pipeline.data.records import Record
from pipeline.data.sources import column_map, iter_file
from pipeline.errors import UserError

from rich.console import Console
from rich.table import Table


def is_data(target: str) -> bool:
    """Whether `rlhf check TARGET` means a file (or card folder) of comparisons, and no recipe."""
    path = Path(target)
    if path.is_dir():
        return (path / "README.md").is_file() and not any(path.glob("*.yaml"))
    return path.suffix in (".jsonl", ".gz", ".parquet", ".json", ".csv", ".tsv")


def check_data(
    target: str,
    tokenizer: str | None = None,
    against: Sequence[str] = (),
    columns: Sequence[str] = (),
    as_json: bool = False,
    held_out_fraction: float = 0.1,
    split: str = "train",
    seed: int = 0,
) -> int:
    """Print the statistics of a file of comparisons or rankings, as text or JSON.

    Args:
        against: files of prompts or demonstrations whose prompts should not stand in this one.
        columns: `ours=theirs` each.
    """
    path = Path(target)
    if not path.exists():
        raise UserError("does not exist", file=path)
    encoder = None
    if tokenizer is not None:
        from pipeline.data.encoding import ChatEncoder
        from pipeline.models.tokenizers import assign_template, load_tokenizer

        loaded = load_tokenizer(tokenizer)
        assign_template(loaded)
        encoder = ChatEncoder(loaded)
    statistics = ComparisonStatistics(held_out_fraction=held_out_fraction, seed=seed, remember_prompts=bool(against))
    for record in _rankings(path, split, column_map(columns)):
        statistics.add(record)

    def count_tokens(prompt: Any, responses: Sequence[str]) -> tuple[int, list[int]]:
        assert encoder is not None
        return len(encoder.prompt_ids(prompt)), [len(encoder.response_ids(response)) for response in responses]

    summary = {"file": str(path), **statistics.result(count_tokens if encoder else None)}
    summary["against"] = [statistics.against(other, _prompts(Path(other))) for other in against]
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        _print_statistics(summary)
    return 0


def _rankings(path: Path, split: str, columns: dict[str, str] | None) -> Iterator[Record]:
    if path.is_dir():
        for file in split_files(path, split):
            yield from iter_file(file, "ranking", columns or card_columns(path))
    else:
        yield from iter_file(path, "ranking", columns)


def _prompts(path: Path) -> Iterator[tuple[int, str]]:
    if not path.exists():
        raise UserError("--against: does not exist", file=path)
    for record in iter_file(path, "prompt"):
        yield record["line"], prompt_text(record["prompt"])


def _print_statistics(summary: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table("", "", title=summary["file"], show_header=False, title_justify="left")

    def share(part: float | None, whole: float | None = None) -> str:
        return "—" if part is None or whole == 0 else f"{part / whole if whole else part:.1%}"

    rows, pairs = summary["rows"], summary["pairs"]
    table.add_row("rows", f"{rows:,}, {summary['trainable']:,} of them trainable with ties dropped")
    table.add_row("prompts", f"{summary['prompts']:,} distinct; {summary['multi_turn']:,} rows hold several turns")
    named = summary["labelers"]
    shown = ", ".join(f"{name} {count:,}" for name, count in list(named.items())[:8])
    more = f", … {len(named) - 8} more" if len(named) > 8 else ""
    unnamed = f"; {summary['unnamed_labeler_rows']:,} rows name none" if summary["unnamed_labeler_rows"] else ""
    table.add_row("labelers", (f"{len(named)}: {shown}{more}" if named else "none named") + (unnamed if named else ""))
    sizes = ", ".join(f"K={size}: {count:,}" for size, count in summary["responses_per_row"].items())
    table.add_row("responses per row", sizes)
    ties = (
        f"{summary['tied_pairs']:,} tied ({share(summary['tied_pairs'], pairs)}), in {summary['rows_with_ties']:,} rows"
    )
    table.add_row("pairs", f"{pairs:,}; {ties}")
    for reason, problem in summary["problems"].items():
        lines = ", ".join(map(str, problem["lines"][:8])) + (", …" if problem["rows"] > 8 else "")
        table.add_row("[yellow]untrainable[/]", f"{problem['rows']:,} × {reason} (lines {lines})")
    if "confidence" in summary:
        c = summary["confidence"]
        table.add_row(
            "confidence", f"{c['rows']:,} rows, {c['lowest']:g} to {c['highest']:g}, half of them below {c['median']:g}"
        )
    length = summary["mean_characters"]
    table.add_row("characters", f"prompt {length['prompt']:.0f}, response {length['response']:.0f} on average")
    longer = summary["longer_wins"]
    table.add_row("length bias", f"the longer response wins {share(longer['share'])} of {longer['pairs']:,} pairs")
    if "tokens" in summary:
        tokens = summary["tokens"]
        p, r, both = (tokens[key] for key in ("prompt", "response", "prompt_and_longest_response"))
        table.add_row(
            "tokens",
            f"prompt {p['median']:.0f} (95 %: {p['p95']:.0f}), response {r['median']:.0f} ({r['p95']:.0f}), "
            f"together at most {both['longest']:.0f}; in a sample of {tokens['sampled_rows']:,} rows, "
            f"where the longer wins {share(tokens['longer_wins'])}",
        )
    if summary["best_position"]:
        places = ", ".join(
            f"{place}: {item['rows']:,} (by chance {item['expected']:,.0f})"
            for place, item in summary["best_position"].items()
        )
        table.add_row("place of the best", places)
    table.add_row("agreement", _agreement_text(summary["agreement"], share))
    near = summary["near_duplicates"]
    table.add_row(
        "near-duplicates",
        f"{near['pairs']:,} pairs of prompts alike to {near['similarity']:.0%}, {near['across_splits']:,} of them across "
        f"the hash split; among {near['sampled_prompts']:,} prompts" + _lines(near["lines"]),
    )
    for other in summary["against"]:
        table.add_row(
            "[yellow]against[/]" if other["same_prompt"] else "against",
            f"{other['file']}: {other['same_prompt']:,} of {other['rows']:,} rows hold a prompt of this file, "
            f"{other['near']:,} pairs nearly (of {other['sampled_rows']:,} sampled rows)" + _lines(other["lines"]),
        )
    console.print(table)


def _lines(pairs: list[list[int]]) -> str:
    return " (lines " + ", ".join(f"{a} and {b}" for a, b in pairs) + ")" if pairs else ""


def _agreement_text(agreement: dict[str, Any] | None, share: Any) -> str:
    if agreement is None:
        return "no pair of responses was judged by two named labelers"
    alpha = agreement["krippendorff_alpha"]
    sampled = "" if agreement["prompt_share"] == 1 else f" (on {agreement['prompt_share']:.1%} of the prompts)"
    text = (
        f"{share(agreement['pairwise'])} of judgements of the same pair agree, "
        f"{share(agreement['pairwise_without_ties'])} where neither ties; "
        f"Krippendorff's alpha {'—' if alpha is None else f'{alpha:.3f}'}; {agreement['judged_pairs']:,} pairs{sampled}"
    )
    pairs = agreement["by_labelers"]
    if len(pairs) > 1:
        text += "; " + ", ".join(
            f"{' and '.join(item['labelers'])} {item['agreement']:.1%} of {item['pairs']:,}" for item in pairs[:10]
        )
    return text
