"""Errors that a client sees, in OpenAI's form."""

from typing import Any

# Characters of a client's own words that messages repeat.
_SHOWN = 100


class ApiError(Exception):
    """An answer other than success: `{"error": {"message", "type", "param", "code"}}`.

    Args:
        status: The HTTP status.
        message: One line that says what is wrong and how to mend it.
        param: The field of the request that is at fault.
        code: A word for programs.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {"error": {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}}


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def shortened(text: str) -> str:
    """The beginning of a text that a client sent, for a message."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def bad_field(name: str, message: str) -> ApiError:
    """A 400 about one field; its name comes before the message."""
    return ApiError(400, f"{name}: {message}", param=name, code="invalid_value")


def unavailable(message: str) -> ApiError:
    """A 503: the server is about to end."""
    return ApiError(503, message, code="unavailable", headers={"retry-after": "5"})
