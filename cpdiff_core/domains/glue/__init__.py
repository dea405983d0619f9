"""Text classification and regression: the six GLUE tasks, and any task of a user's own."""
