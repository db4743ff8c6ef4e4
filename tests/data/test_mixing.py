"""`weight:` has one meaning in every stage: a dataset's share of the rows of one epoch."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

from pipeline.data.mixing import mixture_indices, rows_of_each
from pipeline.errors import UserError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def test_without_weights_every_row_stands_once_in_order() -> None:
    assert mixture_indices([3, 0, 2], [None, None, None], 7).tolist() == [0, 1, 2, 3, 4]


def test_weights_are_shares_of_the_rows() -> None:
    indices = mixture_indices([150, 150], [0.9, 0.1], 0)
    assert rows_of_each(indices, [150, 150]) == [1350, 150]
    times = Counter(indices)
    assert {times[i] for i in range(150)} == {9}
    assert {times[i] for i in range(150, 300)} == {1}


def test_only_the_seed_decides_which_rows_come_once_more() -> None:
    epochs = [mixture_indices([10, 15], [1.0, 1.0], seed) for seed in (0, 0, 1)]
    assert epochs[0].tolist() == epochs[1].tolist() != epochs[2].tolist()
    assert rows_of_each(epochs[2], [10, 15]) == [15, 15]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.floats(0.2, 5)), min_size=1, max_size=5), st.integers(0, 9))
def test_every_row_is_seen_and_shares_hold_to_one_row(parts: list[tuple[int, float]], seed: int) -> None:
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    indices = mixture_indices(sizes, weights, seed)
    assert set(indices) == set(range(sum(sizes)))
    counts = rows_of_each(indices, sizes)
    whole = sum(weight for size, weight in parts if size)
    for (size, weight), count in zip(parts, counts, strict=True):
        assert abs(count - (len(indices) * weight / whole if size else 0)) <= len(parts)


def test_weights_are_given_to_all_or_none() -> None:
    with pytest.raises(UserError, match="some entries have a weight and some have none; give all or none"):
        mixture_indices([3, 2], [1.0, None], 0)


def test_a_weight_that_makes_an_endless_epoch_is_refused() -> None:
    with pytest.raises(UserError, match="one epoch holds"):
        mixture_indices([1000, 1000], [1e-9, 1.0], 0)


def test_no_other_module_mixes_datasets() -> None:
    """One home: nothing else interleaves, and no stage computes with a weight of its sources."""
    for path in (Path(__file__).resolve().parents[2] / "pipeline").rglob("*.py"):
        names = {n.attr for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Attribute)}
        assert "interleave_datasets" not in names, path
