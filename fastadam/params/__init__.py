"""What the user gave: arrays, containers, groups, hyperparameters."""
