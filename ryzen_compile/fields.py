"""What records and reports are made of: frozen values with names, which become strict JSON and come back."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, WithJsonSchema

# Pydantic writes NaN and infinities as these strings and reads them; its schema does not say so by itself.
Number = Annotated[float, WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]})]


class Fields(BaseModel):
    """Named values, no others; numbers that JSON lacks become the strings "NaN", "Infinity" and "-Infinity"."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
