"""The journal takes the current attempt's next token, once, and ends each record once."""

import pytest

from gateway.journal import Failure, Journal, Record
from moering.protocol import Failed, PromptLogprobs, Sampling, Token


def open_record(journal: Journal, request_id: str = "a") -> tuple[Record, list]:
    events: list = []
    record = Record(request_id, [1, 2], Sampling(max_tokens=4), deadline=100.0, sink=events.append)
    journal.add(record)
    return record, events


def test_tokens_are_taken_in_order():
    journal = Journal()
    record, events = open_record(journal)
    submit = record.next_submit(now=40.0)
    assert (submit.attempt, submit.emitted, submit.deadline_s) == (1, [], 60.0)
    tokens = [Token("a", 1, 0, 7), Token("a", 1, 1, 8, "stop")]
    assert journal.take(tokens[0]) is None
    assert journal.take(tokens[1]) is record
    assert events == tokens and record.finished and len(journal) == 0


@pytest.mark.parametrize(
    "stray",
    [
        Token("a", 2, 0, 7),  # repeated
        Token("a", 2, 2, 7),  # one is missing before it
        Token("a", 1, 1, 7),  # of the attempt before
        Token("a", 3, 1, 7),  # of an attempt that was never made
        Token("b", 2, 1, 7),  # of nobody
    ],
)
def test_strays_change_nothing(stray):
    journal = Journal()
    record, events = open_record(journal)
    record.next_submit(0.0)
    record.next_submit(0.0)
    journal.take(Token("a", 2, 0, 5))
    assert journal.take(stray) is None
    assert record.emitted == [5] and len(events) == 1 and journal.dropped_tokens == 1


def test_a_resume_carries_what_the_client_has_and_the_same_sampling():
    journal = Journal()
    record, _ = open_record(journal)
    first = record.next_submit(0.0)
    journal.take(Token("a", 1, 0, 5))
    second = record.next_submit(10.0)
    assert (second.prompt, second.sampling) == (first.prompt, first.sampling)
    assert (second.emitted, second.attempt, second.deadline_s) == ([5], 2, 90.0)
    journal.take(Token("a", 2, 1, 6))
    assert second.emitted == [5], "the message must not change after it was made"


def test_log_probabilities_of_a_prompt_that_is_computed_again_replace_the_first_ones():
    """A router whose memory is short computes a prompt again within the same attempt."""
    journal = Journal()
    record = Record("a", [1, 2, 3, 4, 5], Sampling(max_tokens=4), deadline=100.0, sink=lambda event: None)
    journal.add(record)
    record.next_submit(0.0)
    for start, values in ((1, [-1.0]), (2, [-2.0, -3.0]), (1, [-1.0, -2.0]), (3, [-3.0]), (4, [-4.0])):
        empty: list[list] = [[] for _ in values]
        journal.take_prompt_logprobs(PromptLogprobs("a", 1, start, values, empty, empty))
    assert [(s.token_id, s.logprob) for s in record.prompt_logprobs] == [(2, -1.0), (3, -2.0), (4, -3.0), (5, -4.0)]


def test_the_terminal_event_comes_once():
    journal = Journal()
    record, events = open_record(journal)
    record.next_submit(0.0)
    assert journal.take_failed(Failed("a", 0, "internal", "stale")) is None
    assert journal.take_failed(Failed("a", 1, "internal", "broken")) is record
    journal.fail(record, "timeout", "late")
    assert journal.take_failed(Failed("a", 1, "internal", "again")) is None
    assert journal.take(Token("a", 1, 0, 7, "stop")) is None
    assert events == [Failure("internal", "broken")]
    assert journal.close(record) is False


def test_two_open_records_cannot_share_an_id():
    journal = Journal()
    open_record(journal)
    with pytest.raises(ValueError, match="open already"):
        open_record(journal)
