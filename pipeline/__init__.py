"""InstructGPT's recipe on the Hugging Face stack: pretrain, SFT, reward model, PPO."""

__version__ = "0.1.0"
