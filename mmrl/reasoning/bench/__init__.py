"""Public benchmarks of process reward models: readers for their files, their exact metrics."""
