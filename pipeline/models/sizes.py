"""Sizes that were tuned for speed; none of them changes a result beyond rounding."""

from __future__ import annotations

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


def attention_savings_worth_a_group(device_type: str) -> int:
    return _MIN_SAVING.get(device_type, _MIN_SAVING["cuda"])
