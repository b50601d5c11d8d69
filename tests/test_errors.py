"""Room Errors: the table of errors, row by row, as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import pytest
from schemas import validate

import opendify
from opendify import ProxyError, error_body, error_headers


class Row(NamedTuple):
    """What a class of errors says when nothing else is said."""

    error: type[ProxyError]
    status: int
    type: str
    code: Optional[str]
    headers: tuple[tuple[str, str], ...] = ()


INVALID = "invalid_request_error"
FINAL = ("x-should-retry", "false")
LATER = ("Retry-After", "1 to 60 seconds")  # what all clients honour
TABLE = [
    Row(opendify.BadRequest, 400, INVALID, None),
    Row(
        opendify.Unauthorized,
        401,
        INVALID,
        None,  # a wrong key has a code, see `Site.check_key`
        (("WWW-Authenticate", "Bearer"),),
    ),
    Row(opendify.KeysGuessed, 429, "requests", "rate_limit_exceeded", (LATER,)),
    Row(opendify.Forbidden, 403, INVALID, "permission_denied"),
    Row(opendify.NotFound, 404, INVALID, "unknown_url"),
    Row(opendify.IdNotFound, 404, INVALID, None),
    Row(opendify.ModelNotFound, 404, INVALID, "model_not_found"),
    Row(opendify.MethodNotAllowed, 405, INVALID, "method_not_supported"),
    Row(opendify.RequestTimeout, 408, INVALID, None),
    Row(opendify.BodyTooLarge, 413, INVALID, None),
    Row(opendify.UnsupportedCoding, 415, INVALID, None),
    Row(opendify.HeadTooLarge, 431, INVALID, None),
    Row(opendify.MalformedHTTP, 400, INVALID, None),
    Row(opendify.UpstreamRejected, 400, INVALID, None),
    Row(opendify.WrongMode, 400, INVALID, None),
    Row(opendify.MissingInput, 400, INVALID, None),
    Row(opendify.ConversationGone, 404, INVALID, "not_found"),
    Row(opendify.ConversationLocked, 400, INVALID, "conversation_locked"),
    Row(opendify.PreviousGone, 400, INVALID, "previous_response_not_found"),
    Row(opendify.PromptTooLong, 400, INVALID, "context_length_exceeded"),
    Row(opendify.ContentRefused, 400, INVALID, "content_policy_violation"),
    Row(opendify.RateLimited, 429, "requests", "rate_limit_exceeded", (LATER,)),
    Row(
        opendify.QuotaExceeded,
        429,
        "insufficient_quota",
        "insufficient_quota",
        (FINAL,),
    ),
    Row(opendify.ProxyError, 500, "server_error", None),
    Row(opendify.UpstreamFailed, 502, "server_error", "upstream_error"),
    Row(opendify.NoAnswer, 502, "server_error", "upstream_error"),
    Row(opendify.ConfigurationFault, 502, "server_error", "upstream_error", (FINAL,)),
    Row(opendify.Overloaded, 503, "server_error", "server_is_overloaded", (LATER,)),
    Row(opendify.UpstreamTimeout, 504, "server_error", "upstream_timeout"),
    Row(opendify.NoFirstEvent, 504, "server_error", "upstream_timeout"),
]


def row_id(row: Row) -> str:
    return row.error.__name__


def headers_of(error: ProxyError) -> tuple[tuple[str, str], ...]:
    """The headers, with the range in the place of a good Retry-After."""
    good = [str(seconds) for seconds in range(1, 61)]
    return tuple(
        LATER if name == LATER[0] and value in good else (name, value)
        for name, value in error_headers(error)
    )


def all_classes(base: type[ProxyError] = ProxyError) -> set[type[ProxyError]]:
    """The class and all that inherit from it, defined in the file."""
    inner = [all_classes(child) for child in base.__subclasses__()]
    return {base}.union(*inner)


@pytest.mark.parametrize("row", TABLE, ids=row_id)
def test_error_has_its_status_type_code_and_headers(row: Row) -> None:
    error = row.error("Say what to do.")
    told = Row(type(error), error.status, error.type, error.code, headers_of(error))
    assert told == row


@pytest.mark.parametrize("row", TABLE, ids=row_id)
def test_body_has_all_four_keys_and_fits_the_schema(row: Row) -> None:
    body = error_body(row.error("Say what to do."))
    assert body == {
        "error": {
            "message": "Say what to do.",
            "type": row.type,
            "param": row.error.param,
            "code": row.code,
        }
    }
    validate("ErrorResponse", body)


def test_table_has_every_class_of_the_file() -> None:
    assert {row.error for row in TABLE} == all_classes()


def test_server_errors_never_blame_the_request() -> None:
    blamed = {row.error for row in TABLE if row.type == INVALID}
    assert {row.error for row in TABLE if row.status < 500} - blamed == {
        opendify.KeysGuessed,
        opendify.RateLimited,
        opendify.QuotaExceeded,
    }
    assert [row for row in TABLE if row.status >= 500 and row.error in blamed] == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({}, (None, "upstream_error", []), id="nothing"),
        pytest.param({"param": "p"}, ("p", "upstream_error", []), id="param"),
        pytest.param({"code": "c"}, (None, "c", []), id="code"),
        pytest.param({"code": ""}, (None, "upstream_error", []), id="empty-code"),
        pytest.param({"is_final": True}, (None, "upstream_error", [FINAL]), id="final"),
    ],
)
def test_instance_overrides_its_class(
    given: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    error = opendify.UpstreamFailed("m", **given)
    assert (error.param, error.code, error_headers(error)) == expected
    validate("ErrorResponse", error_body(error))


def test_own_headers_come_first_and_own_retry_after_is_the_only_one() -> None:
    own = ("Retry-After", "60")
    for error, more in (
        (opendify.RateLimited("m"), []),
        (opendify.UpstreamFailed("m", is_final=True), [FINAL]),
    ):
        error.headers.append(own)
        assert error_headers(error) == [own, *more]
        assert error_headers(error) == [own, *more]


def test_error_is_an_exception_that_tells_its_message() -> None:
    with pytest.raises(ProxyError, match=r"^Say what to do\.$"):
        raise opendify.ModelNotFound("Say what to do.", param="model")
