"""Which cores a worker process may use."""

from __future__ import annotations

import os

import pytest

from nermill.worker.contracts.device import Device
from nermill.worker.process import supervisor
from nermill.worker.process.supervisor import cores_of

CPU, CARD = Device("cpu", 0), Device("cuda", 0)


@pytest.fixture(autouse=True)
def _two_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(supervisor, "_socket_of", lambda core: core % 2)


def test_one_process_a_socket_gets_a_socket() -> None:
    assert cores_of([CPU, CPU]) == [{0, 2, 4, 6}, {1, 3, 5, 7}]


def test_shares_are_disjoint_and_leave_no_core_over() -> None:
    shares = cores_of([CPU] * 3)
    assert sum(map(len, shares)) == 8
    assert frozenset().union(*shares) == set(range(8))


@pytest.mark.parametrize(("devices", "index"), [([CPU], 0), ([CARD, CPU], 0), ([CARD, CPU], 1), ([CPU, CPU, CARD], 2)])
def test_a_process_that_shares_with_nobody_has_all_cores(devices: list[Device], index: int) -> None:
    assert cores_of(devices)[index] == set(range(8))


def test_more_processes_than_cores_share_all() -> None:
    assert all(cores_of([CPU] * 20))
