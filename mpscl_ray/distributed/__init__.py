"""Several processes: collectives, batch statistics over workers, and being connected to Ray."""
