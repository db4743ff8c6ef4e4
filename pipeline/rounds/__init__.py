"""Iterated RLHF: rounds of answers, labels, a reward model and PPO; their folders, ledger and report."""
