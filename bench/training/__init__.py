"""One trajectory: from an experiment to results at its budgets."""
