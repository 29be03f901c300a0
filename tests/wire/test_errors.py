"""The error tree: its statuses, and its way through pickle and gRPC."""

from __future__ import annotations

import pickle
import re

import grpc
import pytest

from lynearm.wire import errors
from lynearm.wire.status import error_name_of, reason_of


def leaves(root: type[errors.LynearmError]) -> list[type[errors.LynearmError]]:
    return [root] + [one for child in root.__subclasses__() for one in leaves(child)]


ALL = [cls for cls in leaves(errors.LynearmError) if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_keeps_message_and_remedy_through_pickle(cls: type[errors.LynearmError]) -> None:
    copy = pickle.loads(pickle.dumps(cls("what", "do this")))
    assert type(copy) is cls
    assert (copy.message, copy.remedy, str(copy)) == ("what", "do this", "what: do this")


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_comes_back_from_its_status_and_name(cls: type[errors.LynearmError]) -> None:
    assert cls.status_code in grpc.StatusCode.__members__
    back = errors.error_from_status(cls.status_code, "what", cls.__name__, "do this")
    assert type(back) is cls


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_reason_is_one_by_googles_rules_and_leads_back(cls: type[errors.LynearmError]) -> None:
    reason = reason_of(cls)
    # AIP-193 says what a reason looks like.
    assert re.fullmatch(r"[A-Z][A-Z0-9_]+[A-Z0-9]", reason)
    assert error_name_of(reason) == cls.__name__


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_the_tree_in_the_docstring_is_whole(cls: type[errors.LynearmError]) -> None:
    assert cls.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize(
    ("status", "cls"),
    [("NOT_FOUND", LookupError), ("UNAVAILABLE", ConnectionError), ("INVALID_ARGUMENT", ValueError)],
)
def test_a_status_without_a_name_is_still_the_nearest_builtin(status: str, cls: type[Exception]) -> None:
    assert isinstance(errors.error_from_status(status, "what"), cls)


def test_a_status_that_nobody_raises_is_an_internal_error_that_names_it() -> None:
    error = errors.error_from_status("UNKNOWN", "boom")
    assert isinstance(error, errors.InternalError)
    assert "UNKNOWN: boom" in str(error)
