"""The harness: trains model variants under compute budgets and measures their compute-equivalent gains."""
