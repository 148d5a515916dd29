"""Train cheap language-model runs, fit scaling laws to them, predict the big run."""
