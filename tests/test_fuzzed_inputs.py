"""What a fuzzer made (`fuzz_readers.py`) is read or refused in one line, and so is what hypothesis makes of it."""

import logging

import fuzz_readers
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effnet_repro import messages

KEPT = {name: sorted((fuzz_readers.CORPUS / name).glob("*")) for name in fuzz_readers.READERS}
NAMES = [name for name, kept in KEPT.items() if kept]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(messages.LOG, "handlers", [logging.NullHandler()])


@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_a_fuzzer_are_read_or_refused_in_one_line(name):
    said = [fuzz_readers.attempt(name, path.read_bytes()) for path in KEPT[name]]
    assert any(said), "nothing was refused"


changed = st.tuples(
    st.integers(0, 10**6), st.integers(0, 10**6), st.binary(max_size=6), st.sampled_from("sid")
)


def mutated(data, changes):
    "The bytes with some set, inserted or deleted"
    for place, other, new, how in changes:
        place %= len(data) + 1
        end = {"s": place + len(new), "i": place, "d": place + other % 9}[how]
        data = data[:place] + (b"" if how == "d" else new) + data[end:]
    return data


@pytest.mark.parametrize("name", NAMES)
def test_changed_inputs_are_read_or_refused_in_one_line(name):
    _try(name, 25)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_many_changed_inputs_are_read_or_refused_in_one_line(name):
    _try(name, 2000)


def _try(name, count):
    kept = [path.read_bytes() for path in KEPT[name]]
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    how = settings(max_examples=count, deadline=None, suppress_health_check=checks, database=None)

    @how
    @given(st.sampled_from(kept), st.lists(changed, min_size=1, max_size=4))
    def check(data, changes):
        fuzz_readers.attempt(name, mutated(data, changes))

    check()
