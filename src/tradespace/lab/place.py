"""Where an experiment runs that can run anywhere: torch's device, and the description that its record bears."""

from __future__ import annotations

import torch

from tradespace.api import find_machine
from tradespace.errors import UnsupportedError
from tradespace.measure.accelerators import find_accelerators
from tradespace.spec.device import DeviceSpec


def find_lab_device(name: str | None) -> tuple[torch.device, DeviceSpec]:
    """ "cpu" or None: this machine; "cuda": its first card. Raises UnsupportedError where torch sees none, or the zoo does not know it."""
    if name in (None, "cpu"):
        return torch.device("cpu"), find_machine(None)
    if name != "cuda" or not torch.cuda.is_available():
        raise UnsupportedError(f"--device {name}: torch sees no such device here. Leave it away to run on the CPU")
    card = next((card.as_device() for card in find_accelerators() if card.kind == "cuda"), None)
    if card is None:
        raise UnsupportedError("the device zoo does not know this card, so a record could not say what it was measured on")
    return torch.device("cuda", 0), card
