"""What every backend shares: the formula, the tables, the result of a step."""
