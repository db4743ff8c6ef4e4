"""Prompts to scored responses: sampling engines, rewards, and the rollout that PPO trains on."""
