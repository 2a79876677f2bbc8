"""Whether a LoRA adapter's name still means the weights that the tiers' KV of it was computed with.

vLLM's block hashes know an adapter's name and path. Weights that are loaded anew from the same path have the same
hashes, and KV of the old ones would be wrong tokens. Tiers keep that of the first load alone; vLLM's own advice, a new
path for new weights, has all of it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


class Adapters:
    """What was seen of them, by name and path; forgotten with the process."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], int | None] = {}
        """The number that vLLM gave the first load; None: there was a reload in place, which keeps its number."""

    def may_use_tiers(self, adapter: "LoRARequest") -> bool:
        """May the KV of a request with this adapter be looked for and kept? To be asked once, as it arrives.

        A reload in place happens with every batch of such a request, so that its KV is of no one set of weights.
        """
        name = adapter.lora_name, adapter.lora_path
        if adapter.load_inplace:
            self._first[name] = None
        return self._first.setdefault(name, adapter.lora_int_id) == adapter.lora_int_id
