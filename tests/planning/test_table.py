"""A plan's numbers in units that people use."""

from __future__ import annotations

from pipeline.planning.table import count, duration, energy, size, small


def test_units() -> None:
    assert [duration(h) for h in (3.05e-5, 1e-6, 0.5, 5.0, 96.0)] == [
        "0.11 s",
        "under 0.1 s",
        "30 min",
        "5 h",
        "4 days",
    ]
    assert [energy(k) for k in (3.05e-5, 1e-7, 2.5, 12_345.0)] == [
        "0.0305 Wh",
        "under 0.01 Wh",
        "2.5 kWh",
        "12,345 kWh",
    ]
    assert [small(x) for x in (3e-9, 0.0123, 1234.0)] == ["under 0.001", "0.0123", "1,234"]
    assert [count(n) for n in (12, 1500, 1.3e9)] == ["12", "1.5 k", "1.3 B"]
    assert [size(n) for n in (2**30, 1536)] == ["1 GiB", "1.5 KiB"]
