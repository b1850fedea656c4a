"""The fused feature f_k = Conv_k([x_k ; up(x_3)]): its definition, and what the losses need of it.

A path's feature f at a pixel is the concatenation over the chosen levels k (768 numbers at width 32) of

    f_k = S_k x_k + R_k up(x_3) + b_k          [S_k R_k], b_k: weight and bias of the 1x1 convolution

x: the path's maps, e or d of unet.py; up: nearest upsampling. `literal_features` is f itself. The losses need
only |f|^2 and f.v (`squares_and_dots`), local prototypes only sums of f (`class_sums`): f is not built.
"""

import torch
from torch.nn import functional

PATHS = ("encoder", "decoder")


def on_grid(path, maps, heads, labels):
    """Return x = [a map x_k for each level k, x_3], a convolution for each k, the labels, on the path's grid.

    The levels stand in the order 0, 1, 2 on the encoder path and 2, 1, 0 on the decoder path, and the first
    chosen one gives the grid. Finer maps and labels are sampled, the top-left pixel of each block; coarser
    maps keep their size. maps: [x_0 .. x_3], x_k (B, C_k, H/2^k, W/2^k); heads: {level: 1x1 convolution};
    labels: (B, H, W); returned x_k: (B, h_k, w_k, C_k), of the heads' dtype. Source: released code.
    """
    levels = sorted((int(k) for k in heads), reverse=path == "decoder")
    convs, step = [heads[str(k)] for k in levels], [max(1, 2 ** (levels[0] - k)) for k in range(4)]
    x = [maps[k].permute(0, 2, 3, 1)[:, ::step[k], ::step[k]].to(convs[0].weight.dtype) for k in (*levels, 3)]
    return x, convs, labels[:, ::step[0], ::step[0]]


def literal_features(x, convs):
    """Context fusion: return f (B, h, w, D) of what `on_grid` returned. For reading and for the tests.

        f_k = Conv_k([x_k ; up(x_3)]),   f = [f_k over the levels],   up: nearest

    Source: released code: each level with the deepest; the paper's summaries fuse 'adjacent levels'.
    """
    *x, x_3 = (x_k.permute(0, 3, 1, 2) for x_k in x)
    f = [conv(torch.cat([x_k, functional.interpolate(x_3, x_k.shape[2:])], 1)) for conv, x_k in zip(convs, x)]
    return torch.cat([functional.interpolate(f_k, x[0].shape[2:]) for f_k in f], 1).permute(0, 2, 3, 1)


def split_heads(x, convs):
    """Return the S_k (D_k, C_k), and R (D, C_3 + 1), the [R_k b_k] one below the other; D = sum_k D_k."""
    S, R = zip(*(conv.weight.flatten(1).split([x_k.shape[3], x[-1].shape[3]], 1)
                    for conv, x_k in zip(convs, x)))
    return S, torch.cat([torch.cat(R), torch.cat([conv.bias for conv in convs])[:, None]], 1)


def squares_and_dots(x, convs, v):
    """Return |f|^2 (B, h, w, 1) and f.v (B, h, w, K) of K vectors v (K, D), f of what `on_grid` returned.

    With f = sum_k S_k x_k + R up(x_3), S_k in D_k rows, v_k the same part of v, and a 1 at the end of x_3,

        |f|^2 = sum_k up( (S_k'S_k x_k + 2 S_k'R up(x_3)) . x_k ) + up( R'R x_3 . x_3 )
        f.v   = sum_k up( v_k S_k x_k ) + up( v R x_3 )

    In float32 |f|^2 is right to 1e-6 of its largest part. Source: ours, equal to those of `literal_features`.
    """
    S, R = split_heads(x, convs)
    *x, x_3 = x
    x_3 = functional.pad(x_3, (0, 1), value=1.0)  # the 1 that the biases are multiplied by
    z = functional.linear(x_3, 2 * torch.block_diag(*S).T @ R).split([S_k.shape[1] for S_k in S], 3)
    total = torch.cat([(x_3 @ (R.T @ R) * x_3).sum(3, keepdim=True), functional.linear(x_3, v @ R)], 3)
    for x_k, S_k, v_k, z_k in reversed([*zip(x, S, v.split([len(S_k) for S_k in S], 1), z)]):
        total = Products.apply(x_k, S_k.T @ S_k, v_k @ S_k, z_k, total)
    return total.split([1, len(v)], 3)


class Products(torch.autograd.Function):
    """[q.x, U x] + up(s) of every pixel, q = A x + up(z): (B, h, w, 1 + K); A = A' (C, C), U (K, C).

    Maps x (B, h, w, C), and z (.., C), s (.., 1 + K) of coarser levels. If the result's gradient is [g, d]
    and t = g x, those of x, A, U, z, s are  g q + A t + U'd, sum of t x', sum of d x', down(t), down([g, d]).
    They are written out because torch's own backward pass would hold twice as many maps.
    """

    @staticmethod
    def forward(ctx, x, A, U, z, s):
        q = add_up(x @ A, z)
        ctx.save_for_backward(x, A, U, q)
        ctx.sizes = z.shape[1:3], s.shape[1:3]
        return add_up(torch.cat([(q * x).sum(3, keepdim=True), functional.linear(x, U)], 3), s)

    @staticmethod
    def backward(ctx, gradient):
        x, A, U, q = ctx.saved_tensors
        g, d = gradient.split([1, len(U)], 3)
        t, of_x, d = g * x, g * q, d.flatten(0, 2)
        of_x.flatten(0, 2).addmm_(t.flatten(0, 2), A).addmm_(d, U)
        of_z, of_s = (down(m, size) for m, size in zip((t, gradient), ctx.sizes))
        return of_x, t.flatten(0, 2).T @ x.flatten(0, 2), d.T @ x.flatten(0, 2), of_z, of_s


def add_up(fine, coarse):
    """Add up(coarse) to fine, in place, and return it; fine: (B, h, w, C), coarse: (B, h/r, w/r, C)."""
    wide = coarse.repeat_interleave(fine.shape[2] // coarse.shape[2], 2)
    fine.unflatten(1, (coarse.shape[1], -1)).add_(wide[:, :, None])
    return fine


def down(fine, size):
    """Return the sums of fine (B, h, w, C) over the blocks that lie on each pixel of a coarser size."""
    return fine.unflatten(1, (size[0], -1)).sum(2).unflatten(2, (size[1], -1)).sum(3)


@torch.no_grad()
def class_sums(x, convs, y, classes):
    """Return the sum of f over the pixels of each class (J, D), and their number (J,), in float64.

        sum_j f = sum_k S_k sum_j up(x_k) + R sum_j up(x_3)        sum_j: over the pixels of class j

    A sum over an upsampled map is one over the map itself in which a pixel counts as often as class j lies
    on it. x, convs, y: from `on_grid`; J = classes.
    """
    S, R = split_heads(x, convs)
    member = (y[..., None] == torch.arange(classes, device=y.device)).to(x[0].dtype)  # (B, h, w, J)
    sums = []
    for x_k in (*x[:-1], functional.pad(x[-1], (0, 1), value=1.0)):
        number = down(member, x_k.shape[1:3])  # (B, h_k, w_k, J)
        sums.append(number.flatten(0, 2).T @ x_k.flatten(0, 2))
    W = torch.cat([torch.block_diag(*S), R], 1).double()
    return torch.cat(sums, 1).double() @ W.T, sums[-1][:, -1].double()
