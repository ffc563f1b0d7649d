"""What the library tells while it works: printed, or handed to the program's own handlers."""

import io
import logging

import pytest

from effnet_repro.messages import LOG, byte_size, say


@pytest.fixture
def records():
    "What a program's own handler gets"
    found, handler = [], logging.Handler()
    handler.emit = lambda record: found.append((record.levelname, record.getMessage()))
    level = LOG.level
    LOG.addHandler(handler)
    LOG.setLevel("INFO")
    yield found
    LOG.removeHandler(handler)
    LOG.setLevel(level)


@pytest.mark.parametrize(
    "number, text",
    [(0, "0.0 MiB"), (5 * 2**20, "5.0 MiB"), (2**30 - 1, "1,024 MiB"), (137 * 2**30, "137 GiB")],
)
def test_sizes(number, text):
    assert byte_size(number) == text


def test_steps_are_printed(capsys):
    say("one")
    say("two", file := io.StringIO())
    assert capsys.readouterr().out == "one\n" and file.getvalue() == "two\n"


def test_steps_go_to_the_handlers_of_a_program(capsys, records):
    from effnet_repro.config import say_earlier

    say("one %")
    say_earlier("there", {})
    assert records[0] == ("INFO", "one %") and records[1][1].startswith("there: Written before")
    assert capsys.readouterr() == ("", "")


def test_opening_data_prints_nothing_where_a_program_listens(capsys, records, tmp_path):
    from effnet_repro.data import open_data

    open_data(cache_dir=tmp_path)
    assert any("built-in sample set" in text for _, text in records)
    assert capsys.readouterr() == ("", "")
