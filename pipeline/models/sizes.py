"""Sizes that were tuned for speed; none of them changes a result beyond rounding."""

from __future__ import annotations

from pipeline.models.precision import decides_as

# Lengths are rounded up to multiples: oneDNN compiles a kernel for each new shape, tensor cores need multiples of eight.
TOKEN_MULTIPLE, LENGTH_MULTIPLE = 64, 16
# Attention scores per head that one more group of sequences must save. The CPU's was measured; on a GPU a group costs
# kernel launches, and the number is what its arithmetic does in their time (not measured).
_MIN_SAVING = {"cpu": 2**14, "cuda": 2**22}

LOGITS_BYTES = 256 * 2**20  # of fp32 logits that exist at once
# A CPU computes a few rows of logits after the other, so that each operation on them finds them in its cache: this many
# logits, but not fewer rows than keep its matrix units busy.
CACHED_LOGITS, FEWEST_ROWS = 2**18, 128
ROW_MULTIPLE = 64  # of rows of logits on a CPU, as above
SCORING_TOKENS = 16384  # of one forward pass of a reward model
# Rows that sampling computes are rounded up to a multiple. A GPU takes as long for 57 rows as for 64, and for each number of
# rows that it has not seen it looks for kernels anew and loads them: with one H200, the demo's first rollout took four times
# as long as its sixth (2026-11-26).
_SAMPLING_ROWS = {"cpu": 1, "cuda": 8}


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def attention_savings_worth_a_group(device_type: str) -> int:
    return _MIN_SAVING.get(decides_as(device_type), _MIN_SAVING["cuda"])


def sampling_row_multiple(device_type: str) -> int:
    return _SAMPLING_ROWS.get(decides_as(device_type), _SAMPLING_ROWS["cuda"])
