"""Files with one JSON object per line."""

import json
import math
from typing import Any


def as_line(values: dict[str, Any]) -> str:
    """Format one line of JSON. JSON has no NaN or infinity, so these become null, as after a skipped step."""

    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(element) for element in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    # allow_nan=False refuses a NaN that this function has missed.
    return json.dumps({name: finite(value) for name, value in values.items()}, allow_nan=False) + "\n"
