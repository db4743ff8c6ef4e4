"""One running stage: its processes, output folder, checkpoints, lineage, history and trackers."""
