"""Search for the settings of a method: spaces, trials, early stopping, and what a search leaves."""
