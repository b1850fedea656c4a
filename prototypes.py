"""Context-aware dual-level prototypes (CDPA): local means, FINCH at the server, alignment losses.

A path's fused feature at a pixel is the concatenation over its shallow levels k of

    f_k = Conv_k([x_k ; up(x_3)]) = S_k x_k + D_k x_3 + b_k          encoder x = e, decoder x = d

(768 numbers at width 32). It is never formed on the grid: means commute with the 1x1 convolution,
and the losses need only |f|^2 and f.g, which are sums of one scalar a level (`pixel_products`).
Maps are {path: [x_0 .. x_3]}, x_k (B, C_k, H/2^k, W/2^k); heads are a path's fusion convolutions
{level: 1x1}; prototypes are {path: {class: tensor}}, local ones (D,), global ones (K, D).
"""

import math
from typing import NamedTuple

import torch
from torch.nn import functional

PATHS = ("encoder", "decoder")


# ---- Context fusion: which pixels of which maps ----

def on_grid(path, levels, k, x):
    """Return a level-k map or the labels (k = 0), sampled to be no finer than the path's grid.

    The encoder's grid is that of its finest chosen level, where coarser maps stand for their
    nearest upsampling; the decoder's is that of its coarsest, where finer maps and labels are
    sampled by nearest, the top-left pixel of each block. x: (..., H, W). Source: released code.
    """
    grid = min(levels) if path == "encoder" else max(levels)
    step = max(1, 2 ** (grid - k))
    return x[..., ::step, ::step]


def level_order(path, heads):
    """Return the levels as they are concatenated: encoder 0, 1, 2; decoder 2, 1, 0 (released)."""
    return sorted((int(k) for k in heads), reverse=path == "decoder")


def as_rows(x):
    """Return (B, C, H, W) as rows (B H W, C), without a copy if x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def split_heads(path, heads, deep_channels):
    """Return lists over the levels of S_k (D_k, C_k), D_k (D_k, C_3) and b_k (D_k,)."""
    convs = [heads[str(k)] for k in level_order(path, heads)]
    W = [conv.weight.flatten(1) for conv in convs]
    return ([w[:, :-deep_channels] for w in W], [w[:, -deep_channels:] for w in W],
            [conv.bias for conv in convs])


# ---- Local prototypes ----

@torch.no_grad()
def class_sums(path, maps, heads, labels, classes):
    """Return the sum of the fused features over each class's pixels (J, D), and their number (J,).

        sum_j f_k = S_k sum_j x_k + D_k sum_j up(x_3) + n_j b_k

    where a sum over an upsampled map is a sum over the map with the number of class-j pixels under
    each of its pixels as weight. J = classes. float64, so that many batches add up.
    """
    levels = level_order(path, heads)
    y = on_grid(path, levels, 0, labels)
    member = functional.one_hot(y, classes).permute(0, 3, 1, 2).float()  # (B, J, H, W)

    def sum_by_class(k):
        x = on_grid(path, levels, k, maps[k])
        r = y.shape[-1] // x.shape[-1]
        number = functional.avg_pool2d(member, r) * r**2 if r > 1 else member
        return (as_rows(number).T @ as_rows(x).float()).double()  # (J, C_k)

    n, deep = member.double().sum((0, 2, 3)), sum_by_class(3)
    terms = zip(levels, *split_heads(path, heads, deep.shape[1]))
    fused = [sum_by_class(k) @ S.T.double() + deep @ D.T.double() + n[:, None] * b.double()
             for k, S, D, b in terms]
    return torch.cat(fused, 1), n


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

class Pixels(NamedTuple):
    """The pixels of one path that enter its loss."""

    y: torch.Tensor      # (B, H, W) labels on the path's grid
    index: torch.Tensor  # (N,) into the flattened y


class Rows(NamedTuple):
    """What the loss needs of one map (B, C, h, w): its own pixels under the path's `Pixels`."""

    shape: torch.Size    # (h, w)
    at: torch.Tensor     # (M,) into the map's flattened (B, h, w)
    x: torch.Tensor      # (M, C)


def covering_pixels(index, fine, coarse, batch):
    """Return the pixels of a coarse grid that cover the given ones of a fine grid.

    index: (N,) into a flattened (batch, *fine); returns sorted indices (M,) into (batch, *coarse),
    and for each of the N its position (N,) among them.
    """
    (H, W), (h, w) = fine, coarse
    image, row, column = index // (H * W), index // W % H, index % W
    covering = (image * h + row // (H // h)) * w + column // (W // w)
    used = torch.zeros(batch * h * w, dtype=torch.bool, device=index.device)
    used[covering] = True
    return used.nonzero()[:, 0], (used.cumsum(0) - 1)[covering]


def aligned_pixels(labels, fusion, G):
    """Return {path: Pixels}: the foreground pixels whose class has a global prototype in G."""
    pixels = {}
    for path in PATHS:
        y = on_grid(path, level_order(path, fusion[path]), 0, labels)
        wanted = torch.tensor([j for j in G[path] if j > 0], device=y.device, dtype=y.dtype)
        pixels[path] = Pixels(y, torch.isin(y, wanted).flatten().nonzero()[:, 0])
    return pixels


def keep_rows(pixels, fusion):
    """Return keep(path, k, x) -> Rows, to be given to the network's `features`.

    Rows are taken the moment a map exists, not when the loss is computed: then their gradient stays
    M rows until the backward pass reaches the map, instead of a whole map from its start. On a step
    of batch 6 at 256 pixels that is 150 MB of 1200.
    """
    def keep(path, k, x):
        levels = level_order(path, fusion[path])
        if k not in (*levels, 3):
            return None
        y, index = pixels[path]
        x = on_grid(path, levels, k, x)
        at, _ = covering_pixels(index, y.shape[1:], x.shape[2:], len(y))
        x_at = as_rows(x).index_select(0, at).to(fusion[path][str(levels[0])].weight.dtype)
        return Rows(x.shape[2:], at, x_at)
    return keep


def pixel_products(path, rows, heads, pixels, g):
    """Return |f|^2 (N,) and f.g (N, K) of N pixels' fused features f and K vectors g, f not formed.

        |f|^2 = |D x_3 + b|^2  +  sum_k x_k' S_k'S_k x_k + 2 x_k' S_k'(D_k x_3 + b_k)
        f.g   = g'(D x_3 + b)  +  sum_k x_k' S_k' g_k

    D and b without index: the levels stacked. rows: [Rows of x_0 .. x_3]; g: (K, D), g_k its part
    for level k. A map's scalars are computed once for each of its own pixels and only then taken to
    the grid, because the coarse maps have 4 to 64 times fewer. Source: ours.
    """
    y, index = pixels
    deep, x_3 = rows[3], rows[3].x
    S, D, b = split_heads(path, heads, x_3.shape[1])
    D_all, b_all = torch.cat(D), torch.cat(b)
    to_grid = covering_pixels(index, y.shape[1:], deep.shape, len(y))[1]
    norm2 = ((x_3 @ (D_all.T @ D_all) + 2 * (b_all @ D_all)) * x_3).sum(1) + b_all @ b_all
    norm2 = norm2.index_select(0, to_grid)
    dots = (x_3 @ (g @ D_all).T + g @ b_all).index_select(0, to_grid)
    parts = g.split([len(b_k) for b_k in b], 1)
    for k, S_k, D_k, b_k, g_k in zip(level_order(path, heads), S, D, b, parts):
        shape, at, x_k = rows[k]
        to_grid = covering_pixels(index, y.shape[1:], shape, len(y))[1]
        to_k = covering_pixels(at, shape, deep.shape, len(y))[1]
        context = (x_3 @ (D_k.T @ S_k) + b_k @ S_k).index_select(0, to_k)  # S_k'(D_k x_3 + b_k)
        norm2_k = ((x_k @ (S_k.T @ S_k) + 2 * context) * x_k).sum(1)
        norm2 = norm2 + norm2_k.index_select(0, to_grid)
        dots = dots + (x_k @ (g_k @ S_k).T).index_select(0, to_grid)
    return norm2, dots


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


def compare(path, rows, heads, pixels, G):
    """Return, for the N pixels of a path and its K global prototypes, cosines and errors.

    cos (N, K); positive (N, K), whether a prototype is of the pixel's class; error (N,), the mean
    over channels of (f - Gbar[p][j])^2, Gbar the mean of G's rows; number (N,), which of G's
    foreground classes. (f - Gbar)^2 is expanded, which cancels when f is close to Gbar: in float32
    good to 1e-3 relative at a relative distance of 1e-2.
    """
    wanted = [j for j in sorted(G) if j > 0]
    g, Gbar = torch.cat([G[j] for j in sorted(G)]), torch.stack([G[j].mean(0) for j in wanted])
    j = pixels.y.flatten()[pixels.index]
    owner = torch.cat([j.new_full((len(G[c]),), c) for c in sorted(G)])
    number = torch.searchsorted(j.new_tensor(wanted), j)

    norm2, dots = pixel_products(path, rows, heads, pixels, torch.cat([g, Gbar]))
    norm = norm2.clamp_min(1e-12).sqrt()
    cos = dots[:, :len(g)] / (norm[:, None] * g.norm(dim=1).clamp_min(1e-12))
    own = dots[:, len(g):].gather(1, number[:, None])[:, 0]
    error = (norm2 - 2 * own + Gbar.square().sum(1)[number]) / g.shape[1]
    return cos, j[:, None] == owner, error, number


def path_loss(path, rows, heads, pixels, G, tau, clip=False):
    """Return the means of L_contra_j and L_consis_j over one path's foreground classes present.

        L_consis_j = mean over pixels and channels of (f - Gbar[p][j])^2

    G: {class: (K, D)}, the path's global prototypes. Classes without one are left out; with no
    class left both are 0. Source: paper and released code.
    """
    if len(pixels.index) == 0:
        return rows[3].x.new_zeros(2)
    cos, positive, error, number = compare(path, rows, heads, pixels, G)
    n = number.bincount()
    share = 1 / (n[number] * (n > 0).sum()).to(cos)  # mean over a class's pixels, then over classes
    contrast = contrastive_loss(cos, positive, tau, clip)
    return torch.stack([(share * contrast).sum(), (share * error).sum()])


def alignment_loss(rows, fusion, pixels, G, tau, clip=False):
    """Return the two terms of L_MP, contrastive and consistency, each the mean over the two paths.

        L_MP = mean over paths of mean over classes j of  L_contra_j + L_consis_j

    rows: {path: [Rows]}; fusion: {path: heads}; pixels: {path: Pixels}; G: {path: {class: (K, D)}}.
    A path without a class counts as 0 and is still divided by 2. Computed in float32, outside
    autocast. Source: paper.
    """
    terms = [path_loss(path, rows[path], fusion[path], pixels[path], G[path], tau, clip)
             for path in PATHS]
    return sum(terms) / len(PATHS)
