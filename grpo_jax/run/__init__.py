"""What a run leaves: its folder and records, checkpoints, what a person sees, callbacks, and runs read back from disk."""
