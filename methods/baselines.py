"""The methods that FedBCS is compared with: each is one function of the config, its formula first.

They were published for classification or with other networks; a line 'our adaptation' says what was
decided here to bring one to segmentation. A method's 'feature of an image' is here f, the mean of the
last decoder map d_0 over the image's pixels of one class, D = `width` numbers. P_j (K, D) are the
global prototypes of class j, Pbar_j their mean; L_seg = L_dice of the core. The server takes the
weighted mean of the weights; `weights: equal` is the plain one. FedAvg and FedProx are the core with
switches: federated.py, `objective`.
"""

import importlib.util
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from config import BadInput
from federated import Method, fedbcs, plain_step, run_network, segmentation_loss
from prototypes import cluster_means, contrastive_loss, finch

LAST = "decoder"  # the path under which prototypes of the last decoder map are sent


# ---- What several methods use ----

def image_sums(f, y, classes):
    """Return the sum of f (B, D, H, W) over each image's pixels of a class (B, J, D), and their
    number (B, J), for labels y (B, H, W)."""
    member = functional.one_hot(y, classes).permute(0, 3, 1, 2).to(f.dtype)
    return torch.einsum("bjhw,bdhw->bjd", member, f), member.sum((2, 3))


def class_means(f, y, classes):
    """Return each image's mean feature of each class it has, f (N, D), and their classes (N,)."""
    sums, n = image_sums(f, y, classes)
    image, j = (n > 0).nonzero(as_tuple=True)
    return sums[image, j] / n[image, j, None], j


def aligned(f, j, G):
    """Return the rows of f (N, D) and j (N,) of foreground classes that have a prototype in G."""
    wanted = torch.tensor([c for c in G if c > 0], device=j.device, dtype=j.dtype)
    chosen = torch.isin(j, wanted)
    return f[chosen], j[chosen]


def cosines(f, j, G):
    """Return the cosines (N, K) of rows f (N, D) and all prototypes of G, and own (N, K) bool."""
    owner = torch.cat([j.new_full((len(G[c]),), c) for c in sorted(G)])
    P = torch.cat([G[c] for c in sorted(G)])
    return functional.normalize(f) @ functional.normalize(P).T, j[:, None] == owner


def own_means(j, G):
    """Return Pbar_j (N, D), the mean prototype of each row's class j (N,)."""
    Pbar = torch.stack([G[c].mean(0) for c in sorted(G)])
    return Pbar[torch.searchsorted(j.new_tensor(sorted(G)), j)]


def mean_over_classes(values, j):
    """Return the mean over the classes present of the mean of their values (N,); 0 for N = 0."""
    if len(j) == 0:
        return values.sum()
    return torch.stack([values[j == c].mean() for c in j.unique()]).mean()


# ---- Input amplitude ----

class AmplitudeNorm(nn.Module):
    """Give every image the sites' mean amplitude spectrum: (B, 3, S, S) -> (B, 3, S, S).

        x_hat = F^-1[ Abar exp(i arg F(x)) ],   Abar = average of A_m,   A_m = site m's mean |F(x)|

    Abar is a buffer: it is averaged with the weights, as they are, and normalises the input at evaluation too. In
    round 1 it is 0 and the images pass as they are. The whole amplitude is replaced; HarmoFL's
    released code (L = 0) only moves the mean.
    """

    def __init__(self, size):
        super().__init__()
        self.register_buffer("amplitude", torch.zeros(3, size, size // 2 + 1))

    def forward(self, x):
        if not self.amplitude.any():
            return x
        F = torch.fft.rfft2(x)
        x = torch.fft.irfft2(torch.polar(self.amplitude.expand_as(F), F.angle()), x.shape[-2:])
        return x.contiguous(memory_format=torch.channels_last)


def input_norm(config, step=plain_step):
    """Input-level amplitude normalisation: `AmplitudeNorm` in front of the network, L = L_seg.

    A site gathers A_m from the images of its last local epoch, as they enter training, and sends it
    with its weights. Source: the comparison of the paper's figure 4b.
    """
    def losses(model, x, y, G, total):
        if total is not None:
            total["sum"] = total.get("sum", 0) + torch.fft.rfft2(x).abs().double().sum(0)
            total["n"] = total.get("n", 0) + len(x)
        logits, _, _ = run_network(model, x, config)
        return {"dice": segmentation_loss(logits, y)}

    def send(model, total):
        model.front.amplitude.copy_(total["sum"] / total["n"])
        return {}
    return Method(losses, send, step=step, front=AmplitudeNorm(config.image_size))


# ---- The methods ----

def harmofl(config):
    """HarmoFL (AAAI 22): amplitude normalisation of the input and a perturbed step.

        w' = w + alpha g / |g|,   step from w with the gradient at w',   g = grad L_seg(w)

    alpha = `harmofl_step`, |g| over all weights. Plain mean of the weights.
    """
    def step(optimizer, gradient):
        terms = gradient()
        weights = [p for group in optimizer.param_groups for p in group["params"]
                   if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in weights]))
        scale = config.harmofl_step / norm.clamp_min(1e-12)
        before = [p.detach().clone() for p in weights]
        with torch.no_grad():
            for p in weights:
                p += scale * p.grad
        gradient()  # gathers twice what it gathers, of which only means are kept
        with torch.no_grad():
            for p, w in zip(weights, before):
                p.copy_(w)
        optimizer.step()
        return terms
    return input_norm(config, step)


def fpl(config):
    """FPL (CVPR 23): one mean per class is sent, FINCH at the server, both losses as in FedBCS.

        L = L_seg + L_contra + L_consis
        L_contra = -log( sum_{g in P_j} e^{cos(f,g)/tau} / sum_{all g} e^{cos(f,g)/tau} )
        L_consis = mean over channels of (f - Pbar_j)^2

    tau = `fpl_tau`; mean over the f of a class, then over the foreground classes. L_seg alone in
    round 1. What is sent is the mean over a class's pixels. Our adaptation: f as above, not every
    pixel, which at small scale drew all foreground to one point and the prediction to background.
    """
    def losses(model, x, y, G, total):
        logits, maps, _ = run_network(model, x, config)
        d_0 = maps["decoder"][0].float()
        if total is not None:
            for name, value in zip(("sum", "n"), image_sums(d_0.detach(), y, model.classes)):
                total[name] = total.get(name, 0) + value.sum(0).double()
        contrast, consistency = logits.new_zeros(2)
        if G:
            f, j = aligned(*class_means(d_0, y, model.classes), G[LAST])
            cos, own = cosines(f, j, G[LAST])
            contrast = mean_over_classes(contrastive_loss(cos, own, config.fpl_tau), j)
            consistency = mean_over_classes((f - own_means(j, G[LAST])).square().mean(1), j)
        return {"dice": segmentation_loss(logits, y), "contrast": contrast,
                "consistency": consistency}

    def send(model, total):
        n = total["n"]
        return {LAST: {j: (total["sum"][j] / n[j]).float() for j in range(len(n)) if n[j] > 0}}
    return Method(losses, send)


def fedplvm(config):
    """FedPLVM (NeurIPS 24): sites cluster too, and send a variable number of prototypes.

        C_mj = FINCH means over site m's images of their mean feature of class j   (k, D)
        P_j  = FINCH means of all sites' C_mj
        L    = L_seg + weight [ InfoNCE with cos^power / tau + 2 mean (cos(f, Pbar_j) - 1)^2 ]

    cos is clamped at 1e-6 from below; L_seg alone in round 1; means over the f of a class, then
    over the foreground classes. Plain mean of the weights. Our adaptation: f as above; FINCH's last
    partition is taken, as at the server.
    """
    def losses(model, x, y, G, total):
        logits, maps, _ = run_network(model, x, config)
        f, j = class_means(maps["decoder"][0].float(), y, model.classes)
        if total is not None:
            for c in j.unique().tolist():
                total.setdefault(c, []).append(f[j == c].detach())
        contrast, consistency = logits.new_zeros(2)
        if G:
            f, j = aligned(f, j, G[LAST])
            cos, own = cosines(f, j, G[LAST])
            alike = cos.clamp_min(1e-6) ** config.fedplvm_power
            contrast = mean_over_classes(contrastive_loss(alike, own, config.fedplvm_tau), j)
            cos = functional.cosine_similarity(f, own_means(j, G[LAST]))
            consistency = mean_over_classes(2 * (cos - 1).square(), j)
        return {"dice": segmentation_loss(logits, y), "contrast": config.fedplvm_weight * contrast,
                "consistency": config.fedplvm_weight * consistency}

    def send(model, total):
        features = {j: torch.cat(total[j]) for j in sorted(total)}
        return {LAST: {j: cluster_means(x, finch(x)[-1]) for j, x in features.items()}}
    return Method(losses, send)


def feduv(config):
    """FedUV (CVPR 24): predictions that vary, and features that spread, as if data were uniform.

        L = L_seg + a V + b U
        V = mean_c relu(gamma - std over samples of softmax_c),   gamma = std of an identity column
        U = mean over pairs of exp(-|z_i - z_j|^2 / median)

    a = `feduv_variance`, b = `feduv_uniformity`; the median of |z_i - z_j|^2 is a constant. Our
    adaptation: samples are `feduv_pixels` pixels of a batch, as many of each class present, taken
    at equal steps through its pixels (no random state); z is their last decoder feature.
    """
    def losses(model, x, y, G, total):
        logits, maps, _ = run_network(model, x, config)
        members = [(y.flatten() == j).nonzero()[:, 0] for j in y.unique()]
        share = config.feduv_pixels // len(members)
        steps = [torch.arange(min(share, len(m)), device=y.device) * len(m) // min(share, len(m))
                 for m in members]
        index = torch.cat([m[s] for m, s in zip(members, steps)])
        p, z = (a.permute(0, 2, 3, 1).flatten(0, 2)[index]
                for a in (logits.softmax(1), maps["decoder"][0].float()))
        distance = functional.pdist(z).square()
        gamma = torch.eye(model.classes).std(0)[0].item()
        V = functional.relu(gamma - p.std(0)).mean()
        U = (-distance / distance.detach().median().clamp_min(1e-12)).exp().mean()
        return {"dice": segmentation_loss(logits, y), "variance": config.feduv_variance * V,
                "uniformity": config.feduv_uniformity * U}
    return Method(losses)


METHODS = {"fedavg": fedbcs, "fedprox": fedbcs, "harmofl": harmofl, "fpl": fpl, "fedplvm": fedplvm,
           "feduv": feduv, "input_norm": input_norm, "fedbcs": fedbcs}


def method_of(config):
    """Return the Method that `method` names: an entry of METHODS, or FILE.py:FUNCTION.

    Raises BadInput if that file or function is missing or returns no Method.
    """
    if config.method in METHODS:
        return METHODS[config.method](config)
    file, _, name = config.method.rpartition(":")
    places = Path(file), Path(__file__).parents[1] / file  # where Flower puts it at a site
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise BadInput(f"method: there is no file {file}, give its path from the current folder")
    spec = importlib.util.spec_from_file_location(found.stem, found)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    method = getattr(module, name, lambda config: None)(config)
    if not isinstance(method, Method):
        raise BadInput(f"method: {file} has no function {name}(config) that returns a "
                       "federated.Method, add it")
    return method
