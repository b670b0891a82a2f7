"""Defaults that several commands share, written out so that ``--help`` imports nothing; a test compares them."""

DEFAULT_RECIPE = "int4"  # the configuration's own
ENCODER_RECIPE = "fp32"  # the same for encoders
RECIPE_USED = f"the one the model was trained for, else {DEFAULT_RECIPE}, for an encoder {ENCODER_RECIPE}"
