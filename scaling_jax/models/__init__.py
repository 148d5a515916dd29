"""The decoder-only transformer, its parameter and FLOP counts."""
