"""InstructGPT's recipe on the Hugging Face stack: pretrain, SFT, reward model, PPO."""

import logging

__version__ = "0.1.0"

# On import it warns that a Hub kernel is missing, which only makes 4-bit layers on a CPU faster. Our imports stand
# before third parties' (see pyproject.toml), so this comes in time.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
