"""Every error survives the way between processes, has a code of its own, and a page that explains it."""

from __future__ import annotations

import inspect
import pickle

import pytest

from hierfl import errors
from hierfl.errors import ComeBack, ConfigError, ConfigErrors, HierFLError, NotFound
from hierfl.explain import error_classes, explain, pages

CLASSES = sorted(
    (kind for kind in error_classes() if kind.__module__ == "hierfl.errors"),
    key=lambda kind: (kind.code, kind.__name__),
)

EXIT_CODES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 130}


def example(kind: type[HierFLError]) -> HierFLError:
    """An error with all of its arguments, each of them different."""
    if kind is ConfigErrors:
        return ConfigErrors((ConfigError("a.b", 1, "must be 2", "job.toml"), ConfigError("c", None, "is unknown")))
    if kind.__init__ is HierFLError.__init__:
        return kind("one sentence", 2)
    if kind is ComeBack:
        return ComeBack("<sentence>", 2.5)
    names = list(inspect.signature(kind.__init__).parameters)[1:]
    return kind(*(f"<{name}>" for name in names))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling_with_all_its_arguments(kind):
    error = example(kind)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert copy.args == error.args or kind is ConfigErrors
    assert {k: str(v) for k, v in vars(copy).items()} == {k: str(v) for k, v in vars(error).items()}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_message_holds_every_argument(kind):
    error = example(kind)
    arguments = vars(error).values() if kind.__init__ is not HierFLError.__init__ else error.args
    assert all(str(part) in str(error) for part in arguments if isinstance(part, str | int))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_has_a_section_that_says_whose_move_it_is(kind):
    page = pages()[kind.code]
    assert (page.name, page.exit_code) == (kind.__name__, kind.exit_code)
    assert [mark in page.text for mark in ("**Means:**", "**Whose move:**", "**Next:**")] == [True] * 3
    assert kind.exit_code in EXIT_CODES


def test_codes_are_unique_and_no_section_is_without_its_error():
    codes = [kind.code for kind in CLASSES]
    assert len(set(codes)) == len(codes)
    assert set(pages()) == set(codes)
    assert list(pages()) == sorted(pages())


def test_every_error_is_exported_and_drawn_in_the_tree():
    assert {kind.__name__ for kind in CLASSES} == set(errors.__all__)
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in CLASSES)


@pytest.mark.parametrize("text", ["HFL-302", "hfl-302", "302", "hfl302", " HFL 302 ", "CertificateExpired"])
def test_a_code_is_found_however_it_is_written(text):
    assert explain(text).code == "HFL-302"


@pytest.mark.parametrize(("text", "near"), [("HFL-304", "HFL-303"), ("999", "HFL-900"), ("ConfgError", "ConfigError")])
def test_a_code_that_is_none_names_the_near_one(text, near):
    with pytest.raises(NotFound) as raised:
        explain(text)
    assert f"did you mean '{near}'" in str(raised.value)
