"""InstructGPT's recipe on the Hugging Face stack: pretrain, SFT, reward model, PPO."""

import logging
import os
import signal
import sys

__version__ = "0.1.0"

# On import it warns that a Hub kernel is missing, which only makes 4-bit layers on a CPU faster. Our imports stand
# before third parties' (see pyproject.toml), so this comes in time.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# A stage that was started as a program imports for seconds before it can handle Ctrl-C: until then it ends at once.
if sys.argv[:1] == ["-m"] or os.path.dirname(os.path.realpath(sys.argv[0])) == os.path.dirname(
    os.path.realpath(__file__)
):
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
