"""Papers reproduced from what they released: numbers, figures, and the papers' values beside."""
