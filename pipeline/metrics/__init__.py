"""What is measured: one definition a metric, as `evaluate.Metric` classes that work offline; and the run's history."""

from pipeline.metrics.calibration import ExpectedCalibrationError
from pipeline.metrics.language import BitsPerByte, Perplexity
from pipeline.metrics.preference import PairAccuracy, WinRate

__all__ = ["BitsPerByte", "ExpectedCalibrationError", "PairAccuracy", "Perplexity", "WinRate"]
