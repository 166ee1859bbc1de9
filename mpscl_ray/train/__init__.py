"""One training: its loop, its data, its phases, and the train command."""
