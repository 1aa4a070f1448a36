"""What gradient descent moves: a prompt itself, or what it is computed from while it is tuned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.commands import Reparametrisation


class PromptParameters:
    """The parameters of one prompt `[P, W]`.

    `residual` is P + MLP(P) with a bottleneck and one MLP for all virtual tokens (Razdaibiedina et
    al. 2023, section 3.1). The MLP starts at zero, so that the prompt is what it starts from; only
    the sum is kept, so that nothing of it is left after tuning.

    `prompt` is what rows carry: a leaf whose values follow the parameters.
    """

    def __init__(self, start: Tensor, kind: Reparametrisation, bottleneck: int, seed: int) -> None:
        self.prompt = start.detach().clone().requires_grad_()
        self._base: Tensor | None = None
        if kind == "residual":
            self._base = start.detach().clone().requires_grad_()
            width = start.shape[1]
            # Drawn on the CPU, so that a seed gives the same start everywhere.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self._mlp = nn.Sequential(
                    nn.Linear(width, bottleneck), nn.ReLU(), nn.Linear(bottleneck, width)
                ).to(start.device)
            for weights in self._mlp[2].parameters():
                nn.init.zeros_(weights)

    @property
    def trained(self) -> Sequence[Tensor]:
        """What an optimiser is to move."""
        return [self.prompt] if self._base is None else [self._base, *self._mlp.parameters()]

    def take_gradient(self, most: float) -> None:
        """Pass the gradient of `prompt` on to the parameters, cut to the length `most` (0: not)."""
        if self._base is not None and self.prompt.grad is not None:
            torch.autograd.backward(self._values(self._base), self.prompt.grad)
            self.prompt.grad = None
        if most:
            nn.utils.clip_grad_norm_(self.trained, most)

    def follow(self) -> None:
        """Set `prompt` to what the parameters now make."""
        if self._base is not None:
            with torch.no_grad():
                self.prompt.copy_(self._values(self._base))

    def _values(self, base: Tensor) -> Tensor:
        values: Tensor = base + self._mlp(base)
        return values
