"""A training on Ray: its workers, their resources, their failures, and many trainings side by side."""
