"""The keys of a recipe: one dataclass per stage, what each stage supports, and the reader of YAML and flags."""
