"""A run: its folder, its log, its checkpoints, how it is stopped, and its loop."""
