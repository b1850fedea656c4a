"""The fused feature f_k = Conv_k([x_k ; up(x_3)]): its definition, and what is known without forming it.

A path's feature at a pixel concatenates over its shallow levels k (768 numbers at width 32)

    f_k = S_k x_k + D_k up(x_3) + b_k          [S_k D_k], b_k: weight and bias of the 1x1 convolution

with x = e on the encoder path and x = d on the decoder path. `literal_features` forms it on the path's
grid. What runs does not: means commute with a 1x1 convolution (`class_sums`), and the losses need only
|f|^2 and f.g, which are sums of one number a level (`FusedFeatures`).
Maps are a path's [x_0 .. x_3], x_k (B, C_k, H/2^k, W/2^k); heads are its convolutions {level: 1x1}.
"""

import math

import torch
from torch.nn import functional

PATHS = ("encoder", "decoder")


# ---- Grids and heads ----

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


def split_heads(levels, heads, deep_channels):
    """Return lists over the levels of S_k (D_k, C_k), D_k (D_k, C_3) and b_k (D_k,)."""
    convs = [heads[str(k)] for k in levels]
    W = [conv.weight.flatten(1) for conv in convs]
    return ([w[:, :-deep_channels] for w in W], [w[:, -deep_channels:] for w in W],
            [conv.bias for conv in convs])


# ---- The definition ----

def literal_features(path, maps, heads, labels):
    """Context fusion: return f (B, D, h, w) and the labels (B, h, w) on the path's grid.

        f_k = Conv_k([x_k ; up(x_3)]),   f = [f_k over the levels],   up: nearest

    For reading and for the tests. Source: released code, which fuses each level with the deepest; the
    summaries of the paper say 'adjacent levels'.
    """
    levels = level_order(path, heads)
    h, w = on_grid(path, levels, 0, maps[0]).shape[2:]
    fused = []
    for k in levels:
        up = functional.interpolate(maps[3], maps[k].shape[2:])
        f_k = heads[str(k)](torch.cat([maps[k], up], 1))
        fused.append(functional.interpolate(on_grid(path, levels, k, f_k), (h, w)))
    return torch.cat(fused, 1), on_grid(path, levels, 0, labels)


# ---- Sums over the pixels of a class ----

@torch.no_grad()
def class_sums(path, maps, heads, labels, classes):
    """Return the sum of the fused features over each class's pixels (J, D), and their number (J,).

        sum_j f_k = S_k sum_j x_k + D_k sum_j up(x_3) + n_j b_k

    where a sum over an upsampled map is a sum over the map with the number of class-j pixels under
    each of its pixels as weight. labels: (B, H, W); J = classes. float64, so that many batches add up.
    """
    levels = level_order(path, heads)
    y = on_grid(path, levels, 0, labels)
    member = functional.one_hot(y, classes).permute(0, 3, 1, 2).float()  # (B, J, h, w)

    def sum_by_class(k):
        x = on_grid(path, levels, k, maps[k])
        r = y.shape[-1] // x.shape[-1]
        number = functional.avg_pool2d(member, r) * r**2 if r > 1 else member
        return (as_rows(number).T @ as_rows(x).float()).double()  # (J, C_k)

    n, deep = member.double().sum((0, 2, 3)), sum_by_class(3)
    terms = zip(levels, *split_heads(levels, heads, deep.shape[1]))
    fused = [sum_by_class(k) @ S.T.double() + deep @ D.T.double() + n[:, None] * b.double()
             for k, S, D, b in terms]
    return torch.cat(fused, 1), n


# ---- Norms and dot products at single pixels ----

class FusedFeatures:
    """The fused features f (N, D) of N pixels of a path, of which only norms and products are formed.

        f_k = f~_k + mu_k,   f~_k = S_k x~_k + D_k x~_3,   mu_k = b_k + S_k c_k + D_k c_3,   x~ = x - c

    c is the mean of a map's rows, a constant. So what all pixels have in common, biases above all, stays
    out of the squares, which would cancel. heads: the path's; y: (B, h, w) labels on the path's grid;
    index: (N,) pixels of the flattened grid; j: (N,) their labels. Each map's numbers are computed once
    for every pixel of its own that is needed (M_k rows) and only then taken to the N pixels, because the
    coarse maps have 4 to 64 times fewer. In float32. Source: ours, equal to `literal_features`.
    """

    def __init__(self, path, heads, y, index):
        self.levels, self.heads = level_order(path, heads), heads
        self.grid, self.index, self.j = y.shape, index, y.flatten()[index]
        self.x, self.c, self.at, self.place, self.to_pixels, self.shape = {}, {}, {}, {}, {}, {}

    def take(self, k, x):
        """Take the rows that are needed of the level-k map x (B, C_k, H, W).

        A network calls it as soon as it has the map: rows that are taken only after the whole forward
        pass have gradients of the maps' size that wait through the whole backward pass.
        """
        if k in (*self.levels, 3):
            self.shape[k] = len(x), *x.shape[2:]
            covering = covering_pixels(self.index, self.grid, self.shape[k])
            self.at[k], self.place[k] = distinct(covering, math.prod(self.shape[k]))
            self.to_pixels[k] = self.place[k][covering]
            rows = as_rows(x).index_select(0, self.at[k]).to(self.heads[str(self.levels[0])].weight.dtype)
            self.c[k] = rows.detach().mean(0)
            self.x[k] = rows - self.c[k]  # (M_k, C_k)

    def complete(self, maps):
        """Take what the network did not give of the path's maps, and compute |f~|^2; return self."""
        for k in {*self.levels, 3} - self.x.keys():
            self.take(k, maps[k])
        self.S, self.D, self.b = split_heads(self.levels, self.heads, maps[3].shape[1])
        self.to_deep = {k: self.place[3][covering_pixels(self.at[k], self.shape[k], self.shape[3])]
                        for k in self.levels}
        self.mu_without_b = torch.cat([S_k @ self.c[k] + D_k @ self.c[3]
                                       for k, S_k, D_k in zip(self.levels, self.S, self.D)])  # (D,)
        self.square = self.centred_square()
        return self

    def norm(self):
        """Return |f| (N,), at least 1e-6.

            |f|^2 = |f~|^2 + 2 f~.mu + |mu|^2
        """
        mu = self.mu_without_b + torch.cat(self.b)
        norm2 = self.square + 2 * self.centred_dot(mu[None])[:, 0] + mu @ mu
        return norm2.clamp_min(1e-12).sqrt()

    def dot(self, g):
        """Return f.g (N, K) of K vectors g (K, D).

            f.g = f~.g + mu.g
        """
        return self.centred_dot(g) + g @ (self.mu_without_b + torch.cat(self.b))

    def squared_distance(self, g, own):
        """Return |f - g|^2 (N,) of each pixel and its own of K vectors g (K, D); own: (N,) its number.

            |f - g|^2 = |f~|^2 + 2 f~.(mu - g) + |mu - g|^2
        """
        rest = torch.cat(self.b) - g + self.mu_without_b  # mu - g, the large parts first
        dots = self.centred_dot(rest).gather(1, own[:, None])[:, 0]
        return (self.square + 2 * dots + rest.square().sum(1)[own]).clamp_min(0)

    def centred_square(self):
        """Return |f~|^2 (N,).

            |f~|^2 = |D x~_3|^2  +  sum_k x~_k' S_k'S_k x~_k + 2 x~_k' S_k'D_k x~_3      D: D_k stacked
        """
        x_3, D = self.x[3], torch.cat(self.D)
        square = ((x_3 @ (D.T @ D)) * x_3).sum(1).index_select(0, self.to_pixels[3])
        for k, S_k, D_k in zip(self.levels, self.S, self.D):
            x_k = self.x[k]
            context = (x_3 @ (D_k.T @ S_k)).index_select(0, self.to_deep[k])  # S_k'D_k x~_3
            square_k = ((x_k @ (S_k.T @ S_k) + 2 * context) * x_k).sum(1)
            square = square + square_k.index_select(0, self.to_pixels[k])
        return square

    def centred_dot(self, g):
        """Return f~.g (N, K) of K vectors g (K, D).

            f~.g = sum_k x~_k' S_k' g_k  +  x~_3' D' g                    g_k: the part of g for level k
        """
        dots = (self.x[3] @ (g @ torch.cat(self.D)).T).index_select(0, self.to_pixels[3])
        for k, S_k, g_k in zip(self.levels, self.S, g.split([len(b_k) for b_k in self.b], 1)):
            dots = dots + (self.x[k] @ (g_k @ S_k).T).index_select(0, self.to_pixels[k])
        return dots


def covering_pixels(index, grid, shape):
    """Return the pixel of a map that lies under or over each given one of a grid, by nearest.

    index: (N,) into a flattened grid (B, H, W); returns indices (N,) into the map's flattened grid
    (B, h, w). In a finer map it is the top-left pixel of the block.
    """
    (_, H, W), (_, h, w) = grid, shape
    image, row, column = index // (H * W), index // W % H, index % W
    return (image * h + row * h // H) * w + column * w // W


def distinct(index, size):
    """Return the different ones of indices (N,) below `size`, sorted (M,), and the place of each possible
    index among them (size,)."""
    used = torch.zeros(size, dtype=torch.bool, device=index.device)
    used[index] = True
    return used.nonzero()[:, 0], used.cumsum(0) - 1
