"""What is measured: one definition a metric, as `evaluate.Metric` classes that work offline; and the run's history.

The classes are imported when they are asked for: `evaluate` takes seconds to import, which commands without metrics need not wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.evaluation.calibration import ExpectedCalibrationError
    from pipeline.evaluation.language import BitsPerByte, Perplexity
    from pipeline.evaluation.preference import PairAccuracy, WinRate
    from pipeline.evaluation.text import DistinctN, KLDivergence, Repetition

_HOMES = {
    "BitsPerByte": "language",
    "DistinctN": "text",
    "ExpectedCalibrationError": "calibration",
    "KLDivergence": "text",
    "PairAccuracy": "preference",
    "Perplexity": "language",
    "Repetition": "text",
    "WinRate": "preference",
}

__all__ = [
    "BitsPerByte",
    "DistinctN",
    "ExpectedCalibrationError",
    "KLDivergence",
    "PairAccuracy",
    "Perplexity",
    "Repetition",
    "WinRate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"pipeline.evaluation.{_HOMES[name]}"), name)
