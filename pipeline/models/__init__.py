"""Loading models and tokenizers, the scalar head of reward and value models, and PPO's networks."""
