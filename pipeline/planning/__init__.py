"""Memory, compute and time of a launch, from configurations alone."""
