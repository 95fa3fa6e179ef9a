"""The networks: a shared backbone and one linear head a task."""
