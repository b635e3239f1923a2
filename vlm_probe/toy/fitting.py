"""One way to fit every frozen part of the toy: Muon for matrices, AdamW for the rest.

Muon (orthogonalized momentum, torch.optim.Muon) takes plain matrices only, while
attention weights are stacked by head or by use. Each slice is therefore handed to
it as a view that shares memory with the parameter it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from tqdm.auto import tqdm


def fit(
    module: nn.Module,
    losses: Iterable[torch.Tensor],
    steps: int,
    *,
    muon_lr: float,
    adamw_lr: float,
    matrices: Callable[[str, nn.Parameter], list[slice | int] | None],
    label: str,
) -> None:
    """Minimizes a stream of losses; rates rise over 3 %, then fall in the second half.

    Args:
        module: What is fitted, in place.
        losses: Yields the loss of one batch at a time, with its graph.
        steps: How many losses to take.
        muon_lr: Peak rate of Muon, scaled to AdamW's step size (RMS-matched).
        adamw_lr: Peak rate of AdamW.
        matrices: For a parameter, the indices of the matrices in it that Muon
            fits, or None for AdamW.
        label: Name in the progress bar.
    """
    views: list[tuple[nn.Parameter, slice | int, nn.Parameter]] = []
    plain = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        chosen = matrices(name, parameter)
        if chosen is None:
            plain.append(parameter)
        else:
            views += [(parameter, i, nn.Parameter(parameter.data[i])) for i in chosen]
    muon = torch.optim.Muon(
        [view for _, _, view in views],
        lr=muon_lr,
        weight_decay=0.01,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(plain, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / (0.03 * steps), 2 * (1 - step / steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in (muon, adamw)]
    bar = tqdm(range(steps), desc=label, mininterval=10)
    for step, loss in zip(bar, losses, strict=False):
        module.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for parameter, i, view in views:
            if parameter.grad is not None:
                view.grad = parameter.grad[i]
        muon.step()
        adamw.step()
        for schedule in schedules:
            schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
