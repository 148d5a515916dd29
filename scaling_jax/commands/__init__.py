"""The commands of `scaling-jax`, by subject; `scaling_jax.cli` puts them together."""
