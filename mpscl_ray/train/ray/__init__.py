"""Training on Ray: workers, their resources and failures, and concurrent trainings."""
