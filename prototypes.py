"""Context-aware dual-level prototypes (CDPA): local means, FINCH at the server, alignment losses.

    site:    c_m[p][j] = mean of the fused feature f over the site's pixels of class j, path p
    server:  G[p][j]   = means of FINCH's clusters of the sites' c_m[p][j], Gbar[p][j] their mean
    loss:    L_MP      = mean over paths of mean over classes j of  L_contra_j + L_consis_j

f is the fused feature of fused_features.py. Prototypes are {path: {class: tensor}}, local ones (D,), global
ones (K, D). m: site, p: path.
"""

import torch
from torch.nn import functional

from fused_features import down, squares_and_dots


@torch.no_grad()
def add_class_sums(total, fused):
    """Add one batch to `total` {path: (sums (J, D), numbers (J,))}, which starts empty.

        sum_i f_i = W sum_i X_i        i: the pixels of class j

    A pixel of a coarse map counts once for each pixel of class j on it. fused: from `on_grids`."""
    for path, (X, W, member) in fused.items():
        sums = torch.cat([down(member, x_k.shape[2:]).flatten(1) @ x_k.permute(0, 2, 3, 1).flatten(0, 2)
                          for x_k in X], 1)
        batch = sums @ W.T, sums[:, -1]  # the last, of the 1 behind x_3, are the numbers
        total[path] = tuple(a + b for a, b in zip(total.get(path, (0, 0)), batch))


def local_prototypes(total):
    """Local prototypes: c_m[p][j] = mean over the pixels of class j of the fused feature of path p.

    total: from `add_class_sums`. Returns {path: {class: (D,)}}, only of classes that the site has. The mean
    is over all pixels; the released code takes the mean of batch means. Source: paper.
    """
    return {path: {j: sums[j] / n[j] for j in range(len(n)) if n[j] > 0}
            for path, (sums, n) in total.items()}


def first_neighbour_clusters(x):
    """Return cluster labels (n,) of rows x (n, D): connected components of i -- kappa(i).

    kappa(i) is i's nearest neighbour by cosine, itself excluded. FINCH also links i and j when
    kappa(i) = kappa(j), which adds nothing: both are linked to that neighbour already."""
    similarity = functional.normalize(x.double()) @ functional.normalize(x.double()).T
    kappa = similarity.fill_diagonal_(-torch.inf).argmax(1)
    labels = torch.arange(len(x), device=x.device)
    for _ in x:  # each component takes its smallest index
        labels = torch.minimum(labels, labels[kappa])
        labels = labels.scatter_reduce(0, kappa, labels, "amin")
    return labels.unique(return_inverse=True)[1]


def cluster_means(x, labels):
    """Return the mean of the rows of x (n, D) in each cluster: (K, D)."""
    member = functional.one_hot(labels).T.to(x.dtype)
    return member @ x / member.sum(1, keepdim=True)


def finch(x):
    """Return FINCH's partitions of rows x (n, D), a list of labels (n,). The last is the one to use.

    First neighbours are linked, then those of the clusters' means (of all original rows), until all would be
    one cluster; a first partition of one cluster is kept. Source: FINCH (CVPR 2019), released code."""
    partitions = [first_neighbour_clusters(x)]
    while partitions[-1].max() > 0:
        merged = first_neighbour_clusters(cluster_means(x, partitions[-1]))[partitions[-1]]
        if merged.max() == 0:
            break
        partitions.append(merged)
    return partitions


def aggregate_prototypes(prototypes):
    """Server: return the global prototypes G[p][j] = means of FINCH's clusters, always (K, D).

    prototypes: a list, for each site {path: {class: (D,) or several (k, D)}} of the classes that it has."""
    G = {}
    for path in dict.fromkeys(path for c in prototypes for path in c):
        sent = [c.get(path, {}) for c in prototypes]
        vectors = {j: torch.cat([torch.atleast_2d(c[j]) for c in sent if j in c])
                   for j in sorted({j for c in sent for j in c})}
        G[path] = {j: cluster_means(x, finch(x)[-1]) for j, x in vectors.items()}
    return G


def alignment_loss(fused, G, tau, clip=False):
    """L_MP: return its two terms, L_contra and L_consis, each the mean over the paths of `fused`.

        L_MP = mean over paths of mean over classes j of  L_contra_j + L_consis_j

    j: the foreground classes that have a global prototype and a pixel in the batch; its terms are means over
    its pixels. A path without any j counts as 0. fused: from `on_grids`, outside autocast. Source: paper.
    """
    L = next(iter(fused.values()))[2].new_zeros(2)  # L_contra, L_consis
    for path in reversed(fused):  # the encoder last: the backward pass then frees its large maps first
        if not (foreground := [j for j in G.get(path, ()) if j > 0]):
            continue
        X, W, member = fused[path]
        g, Gbar = torch.cat([*G[path].values()]), torch.stack([G[path][j].mean(0) for j in foreground])
        square, f_dot_unit, f_dot_Gbar = squares_and_dots(X, W, functional.normalize(g), Gbar)
        cos, own = cosines(square, f_dot_unit), columns(G[path])
        contra = torch.stack([contrastive_loss(cos, own[j], tau, clip) for j in foreground])
        pairs = torch.stack([contra, consistency_loss(square, f_dot_Gbar, Gbar)])
        L = L + mean_over_classes(pairs, torch.stack([member[j] for j in foreground]))
    return L / len(fused)


def columns(G_p):
    """Return {class: the slice of its prototypes} where those of all classes stand one after the other."""
    rows = [j for j, g in G_p.items() for _ in g]
    return {j: slice(rows.index(j), rows.index(j) + len(g)) for j, g in G_p.items()}


def cosines(square, f_dot_unit):
    """Return cos(f, g) = f.g / (|f| |g|) of K g, (K, B, h, w), from |f|^2 (1, B, h, w), f.(g / |g|)."""
    return f_dot_unit * functional.threshold(square, 1e-12, 1e-12).rsqrt()  # |f|^2 of at least 1e-12


def contrastive_loss(cos, own, tau, clip=False):
    """What a pixel adds to L_contra_j, InfoNCE: (K, ...) -> (...).

        -log( sum_{g in G[p][j]} e^{cos(f,g)/tau} / sum_{g in all G[p]} e^{cos(f,g)/tau} )

    cos: with all K global prototypes of the path; own: which of them are of class j, a slice or a list. clip:
    as released, e is min(exp(min(cos/tau, 20)), 1e6): at tau 0.005 flat above cosine 0.069. Source: paper."""
    if clip:
        e = (cos / tau).clamp(max=20).exp().clamp(max=1e6)
        return -torch.log((e[own].sum(0) + 1e-9) / (e.sum(0) + 1e-9))
    return -(cos / tau).log_softmax(0)[own].logsumexp(0)


def consistency_loss(square, f_dot_Gbar, Gbar):
    """What a pixel adds to L_consis_j: |f|^2 (1, B, h, w), f.Gbar (J, B, h, w), Gbar (J, D) -> (J, B, h, w).

        1/D |f - Gbar[p][j]|^2 = 1/D (|f|^2 - 2 f.Gbar + |Gbar|^2),   Gbar = mean of G's rows

    Large terms cancel: in float32 the error is below 1 % where f is 0.01 |Gbar| from Gbar. Source: paper."""
    square = square + Gbar.square().sum(1)[:, None, None, None]
    return functional.relu(torch.add(square, f_dot_Gbar, alpha=-2)) / Gbar.shape[1]


def mean_over_classes(values, member):
    """Return the mean over each class's pixels, then over the classes that have any; 0 if none has.

    values: (..., J, B, h, w); member (J, B, h, w): 1 at the pixels of class j, else 0. Returns (...)."""
    n = member.sum([*range(1, member.dim())], keepdim=True)
    share = member / (n * (n > 0).sum()).clamp_min(1)
    return (values * share).flatten(-member.dim()).sum(-1)
