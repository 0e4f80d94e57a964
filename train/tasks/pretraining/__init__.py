"""What is learned without labels."""
