"""Options by which a person chooses what to compute on: `--device`, and for a peer `--precision`, `--compile`,
`--base-bits` and `--vram`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from swarmtrain.cli.common import limit
from swarmtrain.cli.option_errors import OptionError

if TYPE_CHECKING:
    from swarmtrain.protocol.devices import CompileRequest, DeviceRequest, PrecisionRequest
    from swarmtrain.run import RunFile

_F = TypeVar("_F", bound=Callable[..., Any])
_FIELDS = {
    "device": "device",
    "precision": "precision",
    "compile": "compile",
    "base_bits": "base_bits",
    "vram": "vram_bytes",
}
"""Options, by their parameters' names, and the fields of `DeviceOptions` that they set."""
_ALLOWED = "auto: the best one that works; cpu, cuda, cuda:N (mps and xpu: nobody has tested them)."
_SEVERAL = "Several, with the batch shared between them: cuda:0,1, or cpu,cpu for two processes."


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Options for what a peer trains on, as `device_options` collects them."""

    device: DeviceRequest
    precision: PrecisionRequest
    compile: CompileRequest
    vram_bytes: int
    base_bits: str = "32"

    def with_kept(self, kept: Mapping[str, Any]) -> DeviceOptions:
        """Return these options with those that the peer's folder remembers, by parameter name."""
        return replace(self, **{field: kept[name] for name, field in _FIELDS.items() if name in kept})

    def check_here(self) -> None:
        """Raise UserError if the device asked for is not on this machine. Takes seconds unless it is "auto" or
        "cpu"."""
        if self.device.kind in ("auto", "cpu"):
            return
        from swarmtrain.peer.devices.choice import check_device  # with torch

        check_device(self.device)

    def check_run(self, run: RunFile) -> None:
        """Raise UserError if more devices are asked for than can train this run."""
        from swarmtrain.protocol.devices import check_num_ranks

        check_num_ranks(self.device, run)

    def words(self) -> list[str]:
        """Return the options as they are typed, without those that have their defaults."""
        from swarmtrain.protocol.limits import exact_size

        words = ["--device", str(self.device)] if str(self.device) != "auto" else []
        words += ["--precision", self.precision] if self.precision != "auto" else []
        words += ["--compile", self.compile] if self.compile != "auto" else []
        words += ["--base-bits", self.base_bits] if self.base_bits != "32" else []
        return words + (["--vram", exact_size(self.vram_bytes)] if self.vram_bytes else [])


def _device(ctx: click.Context, param: click.Parameter, value: str) -> DeviceRequest:
    from swarmtrain.protocol.devices import parse_device  # without torch: a device that is not there is found later

    try:
        return parse_device(value)
    except ValueError as error:
        raise OptionError(str(error), ctx, param, code="bad-device") from None


def _single_device(ctx: click.Context, param: click.Parameter, value: str) -> DeviceRequest:
    request = _device(ctx, param, value)
    if request.others:
        first = request.each[0]
        raise OptionError(
            f"{value} is several devices, and this command computes on one; give one, such as {first}",
            ctx,
            param,
            code="bad-device",
        )
    return request


DEVICE = click.option("--device", callback=_single_device, default="auto", show_default=True, metavar="DEVICE", help=f"Device to compute on. {_ALLOWED}")  # fmt: skip


def device_options(kind: type[click.Option]) -> Callable[[_F], _F]:
    """Return a decorator that gives a command the options, of this class, for what a peer trains on; the command
    receives them as one argument, `on: DeviceOptions`."""
    options = (
        click.option("--device", cls=kind, callback=_device, default="auto", show_default=True, metavar="DEVICE", help=f"Device to train on. {_ALLOWED} {_SEVERAL}"),
        click.option("--precision", cls=kind, type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", show_default=True, help="Precision to compute in; the weights are fp32 whatever it is. auto: a lower one where a probe finds it faster."),
        click.option("--compile", cls=kind, type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True, help="Compile the model (torch.compile), beside training, and use it if its steps are faster. auto: on a graphics card, models of 10 million parameters and more."),
        click.option("--base-bits", cls=kind, type=click.Choice(["32", "4"]), default="32", show_default=True, help="Bits of each weight of the frozen model of an adapter; 4 on a graphics card, with the package bitsandbytes (untested)."),
        click.option("--vram", cls=kind, callback=limit("parse_size"), default="none", metavar="SIZE", help="Memory of the graphics card that this peer may use, such as 8GB; none: no limit.  [default: none]"),
    )  # fmt: skip

    def decorate(function: _F) -> _F:
        @functools.wraps(function)
        def bundled(**values: Any) -> Any:
            on = DeviceOptions(**{field: values.pop(name) for name, field in _FIELDS.items()})
            return function(on=on, **values)

        decorated: Any = bundled
        for option in reversed(options):
            decorated = option(decorated)
        return decorated  # type: ignore[no-any-return]

    return decorate
