"""The fused feature f_k = Conv_k([x_k ; up(x_3)]): its definition, and what the losses need of it.

A path's feature f at a pixel is the concatenation over the chosen levels k (768 numbers at width 32) of

    f_k = S_k x_k + R_k up(x_3) + b_k          [S_k R_k], b_k: weight and bias of the 1x1 convolution

x: the path's maps, e or d of unet.py; up: nearest upsampling. `literal_features` is f itself. f is linear in
the maps: f = W X, X = [x_k for each level k; up(x_3); 1]. The losses need only |f|^2 and f.v of a few vectors
v (`squares_and_dots`), local prototypes only sums of f (`class_sums`): training builds neither f nor up(x_3).
"""

import torch
from torch.nn import functional


def literal_features(path, maps, heads):
    """Context fusion: return f (B, h, w, D) on the path's grid, see `on_grids`. For reading and tests.

        f_k = Conv_k([x_k ; up(x_3)]),   f = [f_k over the levels],   up: nearest

    maps: [x_0 .. x_3], heads: {k: Conv_k}. Source: released code; the paper's summaries: 'adjacent levels'.
    """
    levels = sorted(map(int, heads), reverse=path == "decoder")  # the first gives the grid
    nearest = functional.interpolate  # its default mode
    f = [heads[str(k)](torch.cat([maps[k], nearest(maps[3], maps[k].shape[2:])], 1)) for k in levels]
    return torch.cat([nearest(f_k, maps[levels[0]].shape[2:]) for f_k in f], 1).permute(0, 2, 3, 1)


def on_grids(maps, fusion, labels, classes):
    """Return {path: (X, W, member)}: f = W X on the path's grid, X: a list of maps (B, h_k, w_k, C_k).

        W = [S_0 0 0 R_0 b_0 ; 0 S_1 0 R_1 b_1 ; 0 0 S_2 R_2 b_2]        of three levels

    The levels' order is 0, 1, 2, but 2, 1, 0 on the decoder path; the first chosen one gives the grid. Of a
    finer map the top-left pixel of each block is taken, and a coarser map keeps its size. So the decoder's
    maps have one size, and are one map; [x_3 ; 1] is last. W: (D, C); member (B, h, w, J): 1 at the pixels of
    class j, else 0. maps: {path: [x_0 .. x_3]}, x_k (B, C_k, H/2^k, W/2^k); fusion: {path: {level: 1x1
    convolution}}, whose dtype X and member get; labels: (B, H, W), the size of x_0; classes: their number J.
    """
    found, j = {}, torch.arange(classes, device=labels.device)
    member = (labels[..., None] == j).to(next(fusion.parameters()).dtype)
    for path in fusion:
        levels = sorted(map(int, fusion[path]), reverse=path == "decoder")
        convs, step = [fusion[path][str(k)] for k in levels], [max(1, 2 ** (levels[0] - k)) for k in range(4)]
        *x, x_3 = (maps[path][k][:, :, ::step[k], ::step[k]].permute(0, 2, 3, 1).to(member.dtype)
                   for k in (*levels, 3))
        S, R = zip(*(conv.weight.flatten(1).split([x_k.shape[3], x_3.shape[3]], 1)
                     for conv, x_k in zip(convs, x)))
        b = torch.cat([conv.bias for conv in convs])[:, None]
        x = [torch.cat(x, 3)] if path == "decoder" else x
        found[path] = ([*x, functional.pad(x_3, (0, 1), value=1.0)],
                       torch.cat([torch.block_diag(*S), torch.cat(R), b], 1), member[:, ::step[0], ::step[0]])
    return found


def squares_and_dots(X, W, *v):
    """Return |f|^2 (B, h, w, 1) and, for each v (K, D), f.v (B, h, w, K) of K vectors. X, W: of `on_grids`.

        f.v = v W X,   |f|^2 = X' W'W X = sum over k of  (A x_k + 2 up(z)) . x_k + |up(R_k x_3 + b_k)|^2

    A = S_k'S_k is the block of W'W that is x_k's alone; z = S_k'(R_k x_3 + b_k) is the one that x_k shares
    with [x_3 ; 1], times it. Each map adds its part at its own size. In float32 |f|^2 is right to 1e-6 of
    its largest part. Source: ours, equal to what `literal_features` gives.
    """
    *x, x_3 = X
    C, K = [x_k.shape[3] for x_k in x], sum(len(vectors) for vectors in v)
    M, M_3 = (torch.cat([W.T, *v]) @ W).split([sum(C), x_3.shape[3]], 1)
    *z, q_3, U_3 = functional.linear(x_3, M_3).split([*C, x_3.shape[3], K], 3)
    total = torch.cat([(q_3 * x_3).sum(3, keepdim=True), U_3], 3)
    *rows, _, U = M.split([*C, x_3.shape[3], K])
    A = [row.narrow(1, sum(C[:k]), C[k]) for k, row in enumerate(rows)]
    for x_k, A_k, U_k, z_k in reversed([*zip(x, A, U.split(C, 1), z)]):
        total = Products.apply(x_k, A_k, U_k, z_k, total)
    return total.split([1, *map(len, v)], 3)


class Products(torch.autograd.Function):
    """[q.x, U x] + up(s) of every pixel, q = A x + 2 up(z): (B, h, w, 1 + K); A = A' (C, C), U (K, C).

    Maps x (B, h, w, C), and z (.., C), s (.., 1 + K) of coarser levels. If the result's gradient is [g, d]
    and t = g x, those of x, A, U, z, s are  2 g (A x + up(z)) + U'd, sum of t x', sum of d x', 2 down(t),
    down([g, d]). They are written out because torch's own backward pass would hold three more maps each."""

    @staticmethod
    def forward(ctx, x, A, U, z, s):
        ctx.save_for_backward(x, A, U, z)
        ctx.size = s.shape[1:3]
        square = add_up(x @ A, z, 2).mul_(x).sum(3, keepdim=True)
        return add_up(torch.cat([square, functional.linear(x, U)], 3), s)

    @staticmethod
    def backward(ctx, gradient):
        x, A, U, z = ctx.saved_tensors
        g, d = gradient[..., :1], gradient[..., 1:].flatten(0, 2)
        t, of_x = g * x, add_up(x @ A, z).mul_(g)
        of_x.flatten(0, 2).addmm_(d, U, beta=2)
        of_A, of_U = t.flatten(0, 2).T @ x.flatten(0, 2), d.T @ x.flatten(0, 2)
        return of_x, of_A, of_U, 2 * down(t, z.shape[1:3]), down(gradient, ctx.size)


def add_up(fine, coarse, times=1):
    """Add times up(coarse) to fine, in place, and return it; fine: (B, h, w, C), coarse: (B, h/r, w/r, C)."""
    blocks = fine.unflatten(2, (coarse.shape[2], -1)).unflatten(1, (coarse.shape[1], -1))
    blocks.add_(coarse[:, :, None, :, None], alpha=times)
    return fine


def down(fine, size):
    """Return the sums of fine (B, h, w, C) over the blocks that lie on each pixel of a coarser size."""
    block = fine.shape[1] // size[0], fine.shape[2] // size[1]
    return fine if block == (1, 1) else functional.avg_pool2d(
        fine.permute(0, 3, 1, 2), block, divisor_override=1).permute(0, 2, 3, 1)


@torch.no_grad()
def class_sums(X, W, member):
    """Return the sum of f over the pixels of each class (J, D), and their number (J,).

        sum_j f = W sum_j X        sum_j: over the pixels of class j

    A pixel of a coarse map counts as often as class j lies on it. X, W, member: of `on_grids`.
    """
    sums = [down(member, x_k.shape[1:3]).flatten(0, 2).T @ x_k.flatten(0, 2) for x_k in X]
    return torch.cat(sums, 1) @ W.T, sums[-1][:, -1]  # the last, of the 1 behind x_3, are the numbers
