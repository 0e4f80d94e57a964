"""Operations whose gradients are written by hand; PyTorch brings its own."""
