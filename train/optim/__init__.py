"""The training step: state, optimiser, schedule, quantisation, and the programs that devices run."""
