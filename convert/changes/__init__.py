"""What changes weights: settings, the task, and what is cut out of them."""
