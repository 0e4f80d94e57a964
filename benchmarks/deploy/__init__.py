"""The benchmark of shipped forms: its runs and their images, the forms, how they are measured, what is told of them."""
