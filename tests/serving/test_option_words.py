"""Options are named as Python has them, or by the flags of a command."""

from __future__ import annotations

import threading

import pytest

from serving.option_words import Flags, give_option, has_flags, name_option, name_options_by_flags
from tasks.batch.options import CsvOptions

FLAGS = Flags(by_option={"slots": "--slots", "allow_pickle": "--allow-pickle", "keys": "--key"}, document="--options")
GIVEN = [
    ("slots", 4, "slots=4 in the options", "--slots 4"),
    ("allow_pickle", True, "allow_pickle=True in the options", "--allow-pickle"),
    ("keys", ["a", "b c"], "keys=['a', 'b c'] in the options", "--key a --key 'b c'"),
    (
        "csv",
        CsvOptions(delimiter=";"),
        "csv=CsvOptions(delimiter=';') in the options",
        """--options '{"csv": {"delimiter": ";"}}'""",
    ),
    ("csv", CsvOptions(), "csv=CsvOptions() in the options", """--options '{"csv": {}}'"""),
    (
        "policies",
        {"a": {"cast": "round"}},
        "policies={'a': {'cast': 'round'}} in the options",
        """--options '{"policies": {"a": {"cast": "round"}}}'""",
    ),
]


@pytest.mark.parametrize(("name", "value", "python", "flag"), GIVEN)
def test_an_option_is_given_as_its_caller_gives_it(name: str, value: object, python: str, flag: str) -> None:
    assert python == give_option(name, value)
    with name_options_by_flags(FLAGS):
        assert flag == give_option(name, value)
    assert python == give_option(name, value)


def test_an_option_is_named_by_its_flag_or_by_the_one_that_takes_all() -> None:
    assert ("slots", "csv.quote", False) == (name_option("slots"), name_option("csv.quote"), has_flags())
    with name_options_by_flags(FLAGS):
        assert ("--slots", "csv.quote of --options", True) == (
            name_option("slots"),
            name_option("csv.quote"),
            has_flags(),
        )


def test_a_command_without_a_document_names_other_options_as_python_does() -> None:
    with name_options_by_flags(Flags(by_option={"allow_pickle": "--allow-pickle"})):
        assert "--allow-pickle" == give_option("allow_pickle", value=True)
        assert "slots=1 in the options" == give_option("slots", 1)
        assert "slots" == name_option("slots")


def test_threads_of_a_command_name_options_by_its_flags_too() -> None:
    said = []
    with name_options_by_flags(FLAGS):
        thread = threading.Thread(target=lambda: said.append(name_option("slots")))
        thread.start()
        thread.join()

    assert ["--slots"] == said
