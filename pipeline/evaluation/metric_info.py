"""What every metric says of itself."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate


def metric_info(metric: Any, inputs: str, citation: str = "", **columns: str) -> evaluate.MetricInfo:
    """Its docstring as description; `columns` are its inputs by name and type."""
    features = datasets.Features({name: datasets.Value(kind) for name, kind in columns.items()})
    return evaluate.MetricInfo(
        description=metric.__doc__ or "", citation=citation, inputs_description=inputs, features=features
    )
