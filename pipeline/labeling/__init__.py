"""The labeling page: people compare, rank and write answers; their labels become records that the stages read."""
