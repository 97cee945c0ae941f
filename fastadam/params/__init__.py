"""What the user gives: arrays, containers, groups, hyperparameters, and the checks of each."""
