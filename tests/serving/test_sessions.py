"""Sessions are bounded in number, in memory and in time."""

import numpy as np
import torch

import unrolled
from unrolled.serving.sessions import Place, Sessions


def place(run: unrolled.Run, tokens: int = 0) -> Place:
    return Place(run.model.initial_state(1), torch.zeros(len(run.tokenizer)), tokens, np.zeros(0, np.int64))


def test_the_one_unused_for_longest_gives_way(toy_run: unrolled.Run) -> None:
    sessions = Sessions(most=3, most_bytes=1 << 30, idle_s=60)
    ids = [sessions.begin("toy", toy_run, place(toy_run)).id for _ in range(3)]
    assert sessions.find(ids[0]) is not None
    ids.append(sessions.begin("toy", toy_run, place(toy_run)).id)
    assert [sessions.find(id) is not None for id in ids] == [True, False, True, True]


def test_memory_is_counted_and_bounded(toy_run: unrolled.Run) -> None:
    size = place(toy_run).bytes
    assert size == 4 * (len(toy_run.tokenizer) + 2 * (64 + 48))
    sessions = Sessions(most=1000, most_bytes=3 * size, idle_s=60)
    for _ in range(10):
        last = sessions.begin("toy", toy_run, place(toy_run))
    assert len(sessions) == 3
    assert sessions.bytes == 3 * size
    sessions.go_on(last, place(toy_run, 5))
    assert sessions.bytes == 3 * size
    assert sessions.end(last.id)
    assert not sessions.end(last.id)
    assert sessions.bytes == 2 * size


def test_an_unused_session_ends(toy_run: unrolled.Run) -> None:
    now = 0.0
    sessions = Sessions(most=10, most_bytes=1 << 30, idle_s=60, now=lambda: now)
    old, used = (sessions.begin("toy", toy_run, place(toy_run)).id for _ in range(2))
    now = 50.0
    assert sessions.find(used) is not None
    now = 100.0
    assert sessions.find(old) is None
    assert sessions.find(used) is not None
    assert len(sessions) == 1
    now = 1000.0
    assert len(sessions) == 0
    assert sessions.bytes == 0
