"""Devices: the CPU, and the machine's accelerator by torch's name for it (cuda, mps, xpu, ...)."""

from typing import Any

import torch

CPU = "cpu"


def accelerator() -> str | None:
    """Return the kind of accelerator that torch finds in this machine, such as cuda; None if there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is None else found.type


def module_of(device: torch.device | str) -> Any:
    """Return torch's module of a kind of device: torch.cuda, torch.xpu, torch.mps, torch.cpu."""
    return torch.get_device_module(torch.device(device).type)


def device_name(name: str) -> str:
    """Return the name unchanged. Raises ValueError if torch knows no such device."""
    try:
        torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"unknown device {name!r}: use cpu, or the name that torch has for yours: cuda, xpu, mps"
        ) from None
    return name


def check_device(name: str) -> str:
    """Return the name unchanged. Raises ValueError if torch knows no such device, or this machine has none."""
    device, own = torch.device(device_name(name)), accelerator()
    count = 1 if own is None else torch.accelerator.device_count()
    if device.type not in (CPU, own) or (device.index or 0) >= (1 if device.type == CPU else count):
        others = "or install a torch that finds your accelerator"
        if own is not None:
            others = f"or {own}" if count == 1 else f"or one from {own}:0 to {own}:{count - 1}"
        raise ValueError(f"device {name!r} is not there: use cpu, {others}")
    return name
