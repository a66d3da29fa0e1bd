"""How parameters move: optimizers and learning-rate schedules."""
