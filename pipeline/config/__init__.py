"""What a recipe may say: one dataclass per stage, what each stage supports, and the reader of YAML and flags."""
