"""Defaults that several commands share, written out so that ``--help`` imports nothing; a test compares them."""

DEFAULT_RECIPE = "int4"  # the configuration's own
RECIPE_USED = f"the one the model was trained for, else {DEFAULT_RECIPE}"
