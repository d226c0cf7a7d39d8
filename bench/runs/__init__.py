"""What a trajectory leaves on disk, and its mirror in W&B."""
