"""What a recipe may say: one dataclass per stage, and the reader of YAML and flags."""
