"""Checks that every family's rows go through, so that a bad row is one clear sentence."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from skyrl_minisandbox.errors import TaskError

M = TypeVar("M", bound=BaseModel)


def parse_row(model: type[M], data: Any, where: str, *, hint: str = "") -> M:
    """`data` as a `model`. Raises `TaskError` that names the row (`where`) and the first bad field."""
    if not isinstance(data, Mapping):
        raise TaskError(f"{where} is not an object with fields but {type(data).__name__}", hint=hint)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(str(part) for part in fault["loc"]) or "the row"
        more = f" ({error.error_count() - 1} more fields are wrong)" if error.error_count() > 1 else ""
        if fault["type"] == "missing":
            message = f"{where} has no field `{field}`{more}"
        elif fault["type"] == "extra_forbidden":
            message = f"{where} has an unknown field `{field}`{more}"
            for near in difflib.get_close_matches(field, model.model_fields, n=1):
                message += f"; near it: `{near}`"
        else:
            message = f"{where}, field `{field}`: {fault['msg'].removeprefix('Value error, ')}{more}"
        raise TaskError(message, hint=hint) from None


def names_of(value: Any) -> Any:
    """A tuple of test names from a list, or from JSON text of one. Raises `ValueError` for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError("is text, but not the JSON of a list of names") from None
    if hasattr(value, "tolist"):  # what pyarrow makes of a list column
        value = value.tolist()
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise ValueError("must be a list of names, or its JSON as text")
