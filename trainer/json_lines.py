"""Files of one JSON object a line."""

import json
import math
from typing import Any


def as_line(values: dict[str, Any]) -> str:
    """One line of JSON, which has no NaN or infinity: such a number is null, as after a skipped step."""

    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(element) for element in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({name: finite(value) for name, value in values.items()}, allow_nan=False) + "\n"
