"""What the study and the benchmark alone use."""
