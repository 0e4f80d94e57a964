"""What a step costs on machines that are not here: arithmetic, memory, communication."""
