"""The paper's figures, a file for each family: plain data in, a matplotlib figure out. Nothing here reads a run."""
