"""Context-aware dual-level prototypes (CDPA): local means, FINCH at the server, alignment losses.

    site:    c_m[p][j] = mean of the fused feature f over the site's pixels of class j, path p
    server:  G[p][j]   = means of FINCH's clusters of the sites' c_m[p][j], Gbar[p][j] their mean
    loss:    L_MP      = mean over paths of mean over classes j of  L_contra_j + L_consis_j

f is the fused feature of fused_features.py. Maps are {path: [x_0 .. x_3]}, fusion {path: heads}, labels
(B, H, W); prototypes are {path: {class: tensor}}, local ones (D,), global ones (K, D).
"""

import math

import torch
from torch.nn import functional

from fused_features import PATHS, FusedFeatures, class_sums, level_order, on_grid

# ---- Local prototypes ----

def add_class_sums(total, maps, fusion, labels, classes):
    """Add one batch to `total` {path: (sums, numbers)}, a dictionary that starts empty."""
    for path in PATHS:
        sums, n = class_sums(path, maps[path], fusion[path], labels, classes)
        before = total.get(path, (0, 0))
        total[path] = before[0] + sums, before[1] + n


def local_prototypes(total):
    """Local prototypes: c_m[p][j] = mean over the pixels of class j of the fused feature of path p.

    total: what `add_class_sums` gathered. Returns {path: {class: (D,) float32}}; a class that the
    site does not have gives none. Exact means over pixels; the released code takes the mean of
    batch means. Source: paper.
    """
    return {path: {j: (sums[j] / n[j]).float() for j in range(len(n)) if n[j] > 0}
            for path, (sums, n) in total.items()}


# ---- Server: FINCH ----

def first_neighbour_clusters(x):
    """Return cluster labels (n,) of rows x (n, D): connected components of i -- kappa(i).

    kappa(i) is i's nearest neighbour by cosine, itself excluded. FINCH also links i and j when
    kappa(i) = kappa(j), which adds nothing: both are linked to that neighbour already.
    """
    similarity = functional.normalize(x.double()) @ functional.normalize(x.double()).T
    kappa = similarity.fill_diagonal_(-math.inf).argmax(1)
    labels, before = torch.arange(len(x), device=x.device), None
    while before is None or not torch.equal(labels, before):  # the smallest index spreads
        before = labels
        labels = torch.minimum(labels, labels[kappa])
        labels = labels.scatter_reduce(0, kappa, labels, "amin")
    return labels.unique(return_inverse=True)[1]


def cluster_means(x, labels):
    """Return the mean of the rows of x (n, D) in each cluster: (K, D)."""
    member = functional.one_hot(labels).T.to(x.dtype)
    return member @ x / member.sum(1, keepdim=True)


def finch(x):
    """Return FINCH's partitions of rows x (n, D), a list of labels (n,), the one to use last.

    First neighbours are linked, then those of the cluster means (of all original rows), until the
    next partition would have one cluster; if the very first has one, it is taken.
    Source: FINCH (Sarfraz et al., CVPR 2019), stopping rule of the released code.
    """
    if len(x) == 1:
        return [torch.zeros(1, dtype=torch.long, device=x.device)]
    partitions = [first_neighbour_clusters(x)]
    while partitions[-1].max() > 0:
        merged = first_neighbour_clusters(cluster_means(x, partitions[-1]))[partitions[-1]]
        if merged.max() == 0:
            break
        partitions.append(merged)
    return partitions


def aggregate_prototypes(prototypes):
    """Server: return the global prototypes G[p][j] = means of FINCH's clusters, always (K, D).

    prototypes: one {path: {class: (D,) or several (k, D)}} a site; a site without a class gives
    none. {} in, {} out.
    """
    G = {}
    for path in dict.fromkeys(path for c in prototypes for path in c):
        sent = [c.get(path, {}) for c in prototypes]
        vectors = {j: torch.cat([torch.atleast_2d(c[j]) for c in sent if j in c])
                   for j in sorted({j for c in sent for j in c})}
        G[path] = {j: cluster_means(x, finch(x)[-1]) for j, x in vectors.items()}
    return G


# ---- Alignment losses ----

def aligned_features(labels, fusion, G):
    """Return {path: f}, the fused features of every foreground pixel whose class has a global prototype.

    The network, or `FusedFeatures.complete`, gives them the maps.
    """
    f = {}
    for path in PATHS:
        y = on_grid(path, level_order(path, fusion[path]), 0, labels)
        wanted = torch.tensor([j for j in G[path] if j > 0], device=y.device, dtype=y.dtype)
        f[path] = FusedFeatures(path, fusion[path], y, torch.isin(y, wanted).flatten().nonzero()[:, 0])
    return f


def alignment_loss(f, maps, G, tau, clip=False):
    """L_MP: return its two terms, L_contra and L_consis, each the mean over the two paths.

        L_MP = mean over paths of mean over classes j of  L_contra_j + L_consis_j

    f: what `aligned_features` returned. A path without any foreground class to align counts as 0 and
    is still divided by 2. Computed in float32, outside autocast. Source: paper.
    """
    L_contra = L_consis = maps["encoder"][3].new_zeros((), dtype=torch.float32)
    for path in PATHS:
        if len(f[path].j) > 0:
            f_p, G_p = f[path].complete(maps[path]), G[path]
            L_contra = L_contra + mean_over_classes(contrastive_loss(*cosines(f_p, G_p), tau, clip), f_p.j)
            L_consis = L_consis + mean_over_classes(consistency_loss(f_p, G_p), f_p.j)
    return L_contra / len(PATHS), L_consis / len(PATHS)


def cosines(f, G):
    """Return cos(f, g) (N, K) of N pixels and a path's K global prototypes, and whether g is of the
    pixel's class (N, K).

        cos(f, g) = f.g / (|f| |g|)
    """
    g = torch.cat([G[j] for j in sorted(G)])
    owner = torch.cat([f.j.new_full((len(G[j]),), j) for j in sorted(G)])
    return f.dot(g) / (f.norm()[:, None] * g.norm(dim=1).clamp_min(1e-12)), f.j[:, None] == owner


def contrastive_loss(cos, positive, tau, clip=False):
    """L_contra, InfoNCE per pixel (N,).

        -log( sum_{g in G[p][j]} e^{cos(f,g)/tau} / sum_{g in all G[p]} e^{cos(f,g)/tau} )

    cos: (N, K) cosines of pixels and global prototypes; positive: (N, K) bool, g is of the pixel's
    class. clip: as the released code does, e = min(exp(min(cos/tau, 20)), 1e6), which at tau 0.005
    leaves no gradient to any cosine above 0.069. Source: paper; clip: released code.
    """
    if clip:
        e = (cos / tau).clamp(max=20).exp().clamp(max=1e6)
        return -torch.log(((e * positive).sum(1) + 1e-9) / (e.sum(1) + 1e-9))
    logits = cos / tau
    return logits.logsumexp(1) - logits.masked_fill(~positive, -math.inf).logsumexp(1)


def consistency_loss(f, G):
    """L_consis per pixel (N,): the squared distance to the mean prototype of the pixel's class j.

        1/D |f - Gbar[p][j]|^2,   Gbar = mean of G's rows

    Source: paper and released code.
    """
    Gbar = torch.stack([G[j].mean(0) for j in sorted(G)])  # (J, D)
    own = torch.searchsorted(f.j.new_tensor(sorted(G)), f.j)
    return f.squared_distance(Gbar, own) / Gbar.shape[1]


def mean_over_classes(values, j):
    """Return the mean over the classes present of the mean of their pixels' values (N,)."""
    n = j.bincount()
    share = 1 / (n[j] * (n > 0).sum()).to(values)
    return (share * values).sum()
