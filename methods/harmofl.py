"""HarmoFL (AAAI 22): amplitude normalisation of the input, and a flat minimum."""

import torch

from methods.input_norm import input_norm
from settings.kinds import number

SETTINGS = {"harmofl_step": (number(above=0), 0.05, "length of the perturbation of the weights")}
FIXED = {"fsr": "none", "prototype_weight": 0.0, "weights": "equal"}


def harmofl(config):
    """HarmoFL (AAAI 22): amplitude normalisation of the input and a perturbed step.

        w' = w + alpha g / |g|,   step from w with the gradient at w',   g = grad L_seg(w)

    alpha = `harmofl_step`, |g| over all weights. Plain mean of the weights.
    """
    def step(optimizer, closure):
        closure()
        weights = [p for group in optimizer.param_groups for p in group["params"]
                   if p.grad is not None]
        gradient, before = [p.grad for p in weights], [p.detach().clone() for p in weights]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradient)))
        scale = config.harmofl_step / norm.clamp_min(1e-12)
        with torch.no_grad():
            torch._foreach_add_(weights, torch._foreach_mul(gradient, scale))

        def closure_there():
            L = closure()  # gathers twice what it gathers, of which only means are kept
            with torch.no_grad():
                torch._foreach_copy_(weights, before)
            return L

        optimizer.step(closure_there)
    return input_norm(config)._replace(step=step)
