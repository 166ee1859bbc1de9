"""What a run leaves and needs: its directory, checkpoints, locks, storage, signals and progress."""
