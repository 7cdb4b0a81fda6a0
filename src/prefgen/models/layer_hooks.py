"""Watching the outputs of decoder layers while a forward pass runs, so that they need not be kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from prefgen.models.prefix_cache import PrefixPlan

OnLayer = Callable[[int, Tensor], None]
"""Called with the number of a layer, 1 to L, and its output (B, T, D)."""


@contextlib.contextmanager
def watch_layers(
    decoder: Any, *, layers: Sequence[int], on_layer: OnLayer | None, plan: PrefixPlan | None = None
) -> Iterator[None]:
    """Call ``on_layer`` for each of ``layers`` inside.

    Args:
        decoder: the language model's list of layers.
        layers: numbers of those to watch.
        on_layer: what to call; None watches nothing.
        plan: of a batch that runs in two passes (histories, then questions): what the passes give is put
            together into packed rows first.
    """
    if on_layer is None:
        yield
        return
    waiting: dict[int, Tensor] = {}

    def show(number: int) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if plan is None:
                on_layer(number, states)
            elif number not in waiting and plan.history.numel():
                waiting[number] = states
            else:
                history = waiting.pop(number, states.new_zeros(plan.shape[0], 0, states.shape[-1]))
                on_layer(number, plan.put_together(history, questions=states))

        return hook

    handles = [decoder[number - 1].register_forward_hook(show(number)) for number in set(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
