"""What servers say of their KV: vLLM's events, followed without a gap or known to be incomplete."""

from impala_vllm.fleet.events.feed import Endpoints, Feed
from impala_vllm.fleet.events.follower import Follower, Sink
from impala_vllm.fleet.events.wire import Cleared, Event, Removed, Stored

__all__ = ["Cleared", "Endpoints", "Event", "Feed", "Follower", "Removed", "Sink", "Stored"]
