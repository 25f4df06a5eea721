"""Errors of the API, in OpenAI's form."""

CLIENT_LEFT = 499  # as nginx counts it


class ApiError(Exception):
    """A request that is not served. `status` is HTTP's."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status = status
        self._param = param
        self._code = code

    @property
    def body(self) -> dict[str, dict[str, object]]:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": kind.get(self.status, default),
                "param": self._param,
                "code": self._code,
            }
        }
