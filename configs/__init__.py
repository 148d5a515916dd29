"""Configs that come with the package; a path that is not found elsewhere is looked for here."""
