"""The stream beside the model's: what is told to the driver, and in which order. A list of calls stands in for CUDA."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from impala_vllm.ops import lane

GPU = torch.device("cuda", 0)


class Driver:
    """What was asked of it. Anything that would make a thread wait is a call like the others, and shows."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.current = "model"
        self.num_streams = 0
        self.num_events = 0


class Stream:
    driver: Driver

    def __init__(self, device: torch.device, name: str | None = None) -> None:
        if name is None:
            self.driver.num_streams += 1
            name = f"side {self.driver.num_streams}"
        self.device, self.name = device, name

    def wait_stream(self, other: "Stream") -> None:
        self.driver.calls.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: "Event") -> None:
        self.driver.calls.append(f"{self.name} waits for {event.name}")

    def synchronize(self) -> None:
        self.driver.calls.append(f"the host waits for {self.name}")


class Event:
    driver: Driver

    def __init__(self, enable_timing: bool = False) -> None:
        self.driver.num_events += 1
        self.name, self.is_over = f"event {self.driver.num_events}", False

    def record(self, stream: Stream) -> None:
        self.driver.calls.append(f"{self.name} on {stream.name}")

    def query(self) -> bool:
        return self.is_over

    def synchronize(self) -> None:
        self.driver.calls.append(f"the host waits for {self.name}")

    def elapsed_time(self, end: "Event") -> float:
        return 250.0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(Stream, "driver", driver, raising=False)
    monkeypatch.setattr(Event, "driver", driver, raising=False)

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, driver.current = driver.current, stream.name
        yield
        driver.current = before

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(GPU, driver.current))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: driver.calls.append("the host waits for all"))
    return driver


def test_a_batch_waits_for_what_the_model_was_given_and_nobody_waits_for_the_batch(driver: Driver) -> None:
    end = lane.of(GPU).run(lambda: driver.calls.append(f"a copy on {driver.current}"))
    assert driver.calls == [
        "side 1 waits for model",
        "event 1 on side 1",
        "a copy on side 1",
        "event 2 on side 1",
    ]
    assert driver.current == "model"
    assert not end.is_done()


def test_the_end_is_asked_for_and_waited_for_only_on_request(driver: Driver) -> None:
    end = lane.of(GPU).run(lambda: None)
    launched = len(driver.calls)
    assert not end.is_done()
    assert driver.calls[launched:] == []
    end.hold_back(Stream(GPU, "model"))  # pyright: ignore[reportArgumentType]
    end.wait()
    assert driver.calls[launched:] == ["model waits for event 2", "the host waits for event 2"]
    assert end.seconds() == 0.25


def test_each_lane_has_a_stream_and_keeps_it(driver: Driver) -> None:
    stores, loads = lane.of(GPU), lane.of(GPU)
    for each in (stores, loads, stores):
        each.run(lambda: driver.calls.append(f"a copy on {driver.current}"))
    copies = [call for call in driver.calls if "copy" in call]
    assert copies == [f"a copy on side {number}" for number in (1, 2, 1)]


def test_on_memory_of_the_host_a_batch_is_done_when_run_returns() -> None:
    done: list[int] = []
    end = lane.of(torch.device("cpu")).run(lambda: done.append(1))
    assert done == [1]
    assert end.is_done()
    assert end.seconds() >= 0.0
