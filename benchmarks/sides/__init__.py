"""What is measured side by side: each module runs one framework's half of a benchmark."""
