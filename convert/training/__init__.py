"""The state of a training run that goes on in the other framework: weights, moments of the optimiser, steps, epochs."""
