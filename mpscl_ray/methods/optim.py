"""Optimisers with their decay, precision, and the guard that lets a non-finite step change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mpscl_ray.config import OptimConfig, ParameterKind, PrecisionConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.distributed.batch_norm import changing_buffers, convert_batch_norm
from mpscl_ray.errors import DataError

GRADIENT_NORM, SKIPPED_STEPS = "gradient_norm", "skipped_steps"
"""Key of the L2 norm of all averaged gradients of a step."""


def poly_lr(base: float, iteration: int, max_iterations: int, power: float = 0.9) -> float:
    """Learning rate of the polynomial decay, base (1 - iteration/max_iterations)^power, and 0 from there on."""
    return float(base * max(0.0, 1.0 - iteration / max_iterations) ** power)


def prepare_network(network: nn.Module, device: torch.device, precision: PrecisionConfig) -> None:
    """Move a network to its device, memory format and batch norms, in place, and compile it; names stay.

    On a GPU, cuDNN times its algorithms on the first batch of each shape.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = precision.tf32
        torch.backends.cudnn.benchmark = True
    network.to(device)
    if precision.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    convert_batch_norm(network, device, fold=not precision.channels_last)
    if precision.compile:
        network.compile()


def autocast(device: torch.device, precision: PrecisionConfig) -> AbstractContextManager[Any]:
    """Context in which networks run forward."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision.dtype == "bf16")


class Optimiser:
    """A torch optimiser with its decay, which changes nothing where the non-finite flag is set.

    Its learning rates are tensors on the device: a step is the same operators at every iteration, as a CUDA graph of it
    has to be.

    Args:
        optimiser: fused, so that it reads the flag on the device and the host does not wait; groups have ``base_lr``.
        parameters: what it trains, by name.
        power: exponent of the decay.
    """

    def __init__(self, optimiser: torch.optim.Optimizer, parameters: Mapping[str, Tensor], power: float) -> None:
        self._optimiser = optimiser
        self._parameters = dict(parameters)
        self._power = power
        for parameter in self._parameters.values():
            optimiser.state[parameter].update(self._initial_state(parameter))
        for group in optimiser.param_groups:
            device = group["params"][0].device
            # The fused kernels of GPUs read a rate in float32 alone.
            dtype = torch.float32 if device.type == "cuda" else torch.float64
            group["lr"] = torch.tensor(group["base_lr"], dtype=dtype, device=device)
            if "capturable" in group:
                group["capturable"] = device.type == "cuda"

    def _initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        # Explicit zeros: a flagged first step would leave the optimiser's own lazy ones uninitialised.
        if isinstance(self._optimiser, torch.optim.SGD):
            return {"momentum_buffer": torch.zeros_like(parameter)}
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}

    def start_iteration(self, iteration: int, iterations: int, lr_factor: float | None = None) -> None:
        """Clear the gradients and set the learning rate: by the decay at this iteration, or by a factor."""
        self.clear_gradients()
        self.set_learning_rate(iteration, iterations, lr_factor)

    def clear_gradients(self) -> None:
        """Leave no parameter a gradient."""
        self._optimiser.zero_grad(set_to_none=True)

    def set_learning_rate(self, iteration: int, iterations: int, lr_factor: float | None = None) -> None:
        """Set the rates, in place: by the decay at this iteration, or to the initial ones times a factor."""
        for group in self._optimiser.param_groups:
            base = group["base_lr"]
            decayed = poly_lr(base, iteration, iterations, self._power)
            group["lr"].fill_(decayed if lr_factor is None else base * lr_factor)

    @property
    def learning_rate(self) -> Tensor:
        """Rate of the first group: for a segmenter that of all but its heads."""
        rate: Tensor = self._optimiser.param_groups[0]["lr"]
        return rate

    def gradients(self) -> list[Tensor]:
        """Gradients of all parameters that have one."""
        return [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]

    def step(self, non_finite: Tensor) -> None:
        """Update the parameters unless ``non_finite`` (0-dim float32 on their device) is 1."""
        self._optimiser.found_inf = non_finite  # type: ignore[attr-defined]
        self._optimiser.step()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The live state tensors by kind, then by parameter name."""
        state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._parameters.items():
            for kind, tensor in self._optimiser.state[parameter].items():
                state.setdefault(kind, {})[name] = tensor
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load what :meth:`state_dict` returned; DataError if the state is not of an optimiser of these parameters."""
        for name, parameter in self._parameters.items():
            for kind, tensor in self._optimiser.state[parameter].items():
                saved = state.get(kind, {}).get(name)
                if saved is None or saved.shape != tensor.shape:
                    found = "nothing" if saved is None else f"shape {tuple(saved.shape)}"
                    raise DataError(
                        f"the checkpoint has {found} for the optimiser's '{kind}' of {name}, expected shape "
                        f"{tuple(tensor.shape)}; resume with the settings that the run was started with"
                    )
                tensor.copy_(saved)


class SegmenterSGD(Optimiser):
    """SGD with momentum of the segmenter, the heads at their own rate.

    With ``legacy_param_repeats`` a parameter takes r sub-steps on one gradient g, to which every sub-step adds the
    weight decay again: g_k = g_{k-1} + wd p_{k-1}; v_k = momentum v_{k-1} + g_k; p_k = p_{k-1} - lr v_k, k = 1..r.

    Source: released code of Liu et al. 2022, run with the SGD of torch 1.3 on lists that hold parameters several times.
    """

    def __init__(self, segmenter: nn.Module, config: OptimConfig) -> None:
        named = {name: p for name, p in segmenter.named_parameters() if p.requires_grad}
        kinds = {name: parameter_kind(name) for name in named}
        backbone = [p for name, p in named.items() if kinds[name] != "head"]
        heads = [p for name, p in named.items() if kinds[name] == "head"]
        repeats = config.legacy_param_repeats
        sgd = torch.optim.SGD(
            [
                {"params": backbone, "base_lr": config.lr},
                {"params": heads, "base_lr": config.lr * config.head_lr_factor},
            ],
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.segmenter_weight_decay if repeats is None else 0.0,
            fused=True,
        )
        super().__init__(sgd, named, config.poly_power)
        self._weight_decay = config.segmenter_weight_decay
        self._repeats = None if repeats is None else {name: repeats.get(kind, 1) for name, kind in kinds.items()}

    def step(self, non_finite: Tensor) -> None:
        if self._repeats is None:
            super().step(non_finite)
            return
        for sub_step in range(1, max(self._repeats.values()) + 1):
            for name, parameter in self._parameters.items():
                if self._repeats[name] < sub_step:
                    parameter.grad = None
            active = [parameter for parameter in self._parameters.values() if parameter.grad is not None]
            with torch.no_grad():
                torch._foreach_add_(self.gradients(), active, alpha=self._weight_decay)
            super().step(non_finite)


class SegmenterAdamW(Optimiser):
    """AdamW of all trained parameters of the segmenter, at one rate.

    Source: Loshchilov & Hutter 2019 as in torch, where a step also shrinks the weights by lr times the weight decay.
    """

    def __init__(self, segmenter: nn.Module, config: OptimConfig) -> None:
        named = {name: p for name, p in segmenter.named_parameters() if p.requires_grad}
        adamw = torch.optim.AdamW(
            [{"params": list(named.values()), "base_lr": config.lr}],
            lr=config.lr,
            betas=(0.9, 0.999),
            weight_decay=config.segmenter_weight_decay,
            fused=True,
        )
        super().__init__(adamw, named, config.poly_power)


def learning_rates(optimisers: Mapping[str, Optimiser]) -> dict[str, Tensor]:
    """``learning_rate_NAME``, 0-dim, of each optimiser."""
    return {f"learning_rate_{name}": optimiser.learning_rate.clone() for name, optimiser in optimisers.items()}


SEGMENTER_OPTIMISERS: dict[str, Callable[[nn.Module, OptimConfig], Optimiser]] = {
    "sgd": SegmenterSGD,
    "adamw": SegmenterAdamW,
}
"""Optimiser of the segmenter by ``OptimConfig.kind``."""


class NetworkAdam(Optimiser):
    """Adam of all parameters of a network, for discriminators and image translators."""

    def __init__(self, network: nn.Module, lr: float, betas: tuple[float, float], power: float) -> None:
        named = dict(network.named_parameters())
        adam = torch.optim.Adam([{"params": list(named.values()), "base_lr": lr}], lr=lr, betas=betas, fused=True)
        super().__init__(adam, named, power)

    def set_step(self, number: int) -> None:
        """Make the next update number ``number``, from 0, in the bias correction, with epsilon as TensorFlow has it.

        TensorFlow adds 1e-8 to the root of the second moment before its bias is corrected, torch after that.
        """
        (group,) = self._optimiser.param_groups
        group["eps"] = 1e-8 / math.sqrt(1.0 - group["betas"][1] ** (number + 1))
        steps = [self._optimiser.state[parameter]["step"] for parameter in group["params"]]
        torch._foreach_zero_(steps)
        torch._foreach_add_(steps, number)


def parameter_kind(name: str) -> ParameterKind:
    """Part of the segmenter that a parameter belongs to, by its state-dict name."""
    if name.startswith(("layer5.", "layer6.")):
        return "head"
    if ".downsample." in name:
        return "downsample"
    return "block" if name.startswith("layer") else "stem"


class NonFiniteGuard:
    """Checks on all workers whether a step is finite, and keeps the losses of the last that was counted.

    ``flag`` is 0-dim float32 on the device, changed in place: 1 where nothing may be updated, which is a step that is
    not finite, and every step once more than ``may_skip`` were not.
    """

    def __init__(self, device: torch.device, may_skip: int = 0) -> None:
        self.flag = torch.zeros((), dtype=torch.float32, device=device)
        self._may_skip = may_skip
        # Steps in which nothing was updated, before this one, less those that may be skipped.
        self._excess = torch.tensor(-may_skip, dtype=torch.float32, device=device)
        self._names: tuple[str, ...] = ()
        self._losses = torch.zeros(0, dtype=torch.float64, device=device)

    @property
    def skipped(self) -> Tensor:
        """0-dim: number of steps so far in which nothing was updated."""
        return self._excess + self._may_skip + self.flag

    def begin(self) -> None:
        """Begin a step."""
        self._excess.add_(self.flag)
        torch.clamp(self._excess, 0, 1, out=self.flag)

    def restart(self, skipped: Tensor | float = 0) -> None:
        """Begin a phase, or continue one in which so many steps were skipped."""
        self._excess.fill_(skipped).sub_(self._may_skip)
        self.flag.zero_()

    @torch.no_grad()
    def update(self, losses: Mapping[str, Tensor], gradients: Sequence[Tensor]) -> None:
        """Check this worker's component losses (0-dim, by name) and the averaged gradients; one small collective."""
        watched = dict(losses)
        if gradients:
            watched[GRADIENT_NORM] = torch.nn.utils.get_total_norm(gradients)
        values = torch.stack([value.detach() for value in watched.values()]).double()
        if self._names != tuple(watched):
            self._names, self._losses = tuple(watched), values.clone()
        torch.where(self.flag > 0, self._losses, values, out=self._losses)
        # Zero times a value is NaN where the value is not finite.
        bad = collectives.all_reduce_any((values * 0.0).sum() != 0)
        torch.maximum(self.flag, bad, out=self.flag)

    def losses(self) -> dict[str, Tensor]:
        """This worker's losses and gradient norm at the last step, or at the first from which on nothing is updated."""
        return dict(zip(self._names, self._losses.unbind(), strict=True))


class Snapshot:
    """A copy of tensors, restored where a flag on the device is set."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        # One flat copy for each dtype: a few kernels instead of hundreds.
        self._groups = [(group, _flat(group)) for group in by_dtype.values()]

    @torch.no_grad()
    def restore_where(self, flag: Tensor) -> None:
        """Restore the values if ``flag`` (0-dim) is positive."""
        restored = flag > 0
        for tensors, before in self._groups:
            values = torch.where(restored, before, _flat(tensors)).split_with_sizes([t.numel() for t in tensors])
            torch._foreach_copy_(tensors, [value.view_as(t) for value, t in zip(values, tensors, strict=True)])


class Optimisers:
    """All optimisers of a method and the buffers of its networks: an iteration updates all of them or none."""

    def __init__(self, networks: Mapping[str, nn.Module], device: torch.device, may_skip: int = 0) -> None:
        self._networks = networks
        self._buffers: list[Tensor] = []
        self._before = Snapshot([])
        self._optimisers: dict[str, Optimiser] = {}
        self.guard = NonFiniteGuard(device, may_skip)
        self.iterations = 0

    def start(self, optimisers: Mapping[str, Optimiser], iterations: int) -> None:
        """Begin a phase of so many iterations with fresh optimisers, the networks in training mode."""
        self._optimisers, self.iterations = dict(optimisers), iterations
        self.guard.restart()
        self._buffers = [buffer for network in self._networks.values() for buffer in changing_buffers(network)]
        for network in self._networks.values():
            network.train()

    def start_iteration(self, iteration: int, lr_factor: float | None = None) -> None:
        """Begin an iteration: set the learning rates, copy the buffers, clear the gradients."""
        self.set_learning_rates(iteration, lr_factor)
        self.begin()

    def set_learning_rates(self, iteration: int, lr_factor: float | None = None) -> None:
        """Set them to the initial ones times ``lr_factor``; None is the polynomial decay at this iteration, from 0."""
        assert self.iterations > 0, "start_phase comes before the first step"
        for optimiser in self._optimisers.values():
            optimiser.set_learning_rate(iteration, self.iterations, lr_factor)

    def begin(self) -> None:
        """What begins an iteration besides: copy the buffers, clear the gradients."""
        self.guard.begin()
        self._before = Snapshot(self._buffers)
        for optimiser in self._optimisers.values():
            optimiser.clear_gradients()

    def step(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Update all, unless a loss or gradient is not finite on some worker, or too many steps before were not.

        ``losses`` are this worker's component losses, 0-dim, by name. Returns the flag: 1 where nothing was updated.
        """
        gradients = [gradient for optimiser in self._optimisers.values() for gradient in optimiser.gradients()]
        self.guard.update(losses, gradients)
        self._before.restore_where(self.guard.flag)
        for optimiser in self._optimisers.values():
            optimiser.step(self.guard.flag)
        return self.guard.flag.clone()

    def diagnostics(self) -> dict[str, Tensor]:
        """Learning rate of each network, norm of all gradients of the last step, over all networks, skipped steps."""
        norm = {key: value for key, value in self.guard.losses().items() if key == GRADIENT_NORM}
        return learning_rates(self._optimisers) | norm | {SKIPPED_STEPS: self.guard.skipped}

    def state_dict(self) -> dict[str, Any]:
        """State of the optimisers by name, in live tensors, and the phase."""
        return {
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self._optimisers.items()},
            "phase": {"iterations": self.iterations, "skipped": self.guard.skipped},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned into the optimisers of a started phase."""
        self.guard.restart(state["phase"].get("skipped", 0))
        for name, optimiser in self._optimisers.items():
            optimiser.load_state_dict(state["optimisers"].get(name, {}))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
