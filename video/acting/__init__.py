"""What an agent may do with a film: the syntax of its calls, manipulations, and the state that they change."""
