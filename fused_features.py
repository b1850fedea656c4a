"""The fused feature f_k = Conv_k([x_k ; up(x_3)]): its definition, and what the losses need of it.

A path's feature f at a pixel is the concatenation over the chosen levels k (768 numbers at width 32) of

    f_k = S_k x_k + R_k up(x_3) + b_k          [S_k R_k], b_k: weight and bias of the 1x1 convolution

x: the path's maps, e or d of unet.py; up: nearest upsampling. `literal_features` is f itself. f is linear in
the maps: f = W X, X = [x_k for each level k; up(x_3); 1]. The losses need only |f|^2 and f.v of a few vectors
v (`squares_and_dots`), local prototypes only sums of f: training builds neither f nor up(x_3).
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
    """Return {path: (X, W, member)}: f = W X on the path's grid, X: a list of maps (B, C_k, h_k, w_k).

        W = [S_0 0 0 R_0 b_0 ; 0 S_1 0 R_1 b_1 ; 0 0 S_2 R_2 b_2]        of three levels

    The levels' order is 0, 1, 2, but 2, 1, 0 on the decoder path; the first chosen one gives the grid. Of a
    finer map the top-left pixel of each block is taken, and a coarser map keeps its size. So the decoder's
    shallow maps have one size and are concatenated; [x_3 ; 1] is last. W: (D, C); member (J, B, h, w): 1 at
    the pixels of class j, else 0. maps: {path: [x_0 .. x_3]}, x_k (B, C_k, H/2^k, W/2^k); fusion: {path:
    {level: 1x1 convolution}}, whose dtype X and member get; labels: (B, H, W), the size of x_0; classes: J.
    """
    found, j = {}, torch.arange(classes, device=labels.device)[:, None, None, None]
    member = (labels == j).to(next(fusion.parameters()).dtype)
    for path in fusion:
        first, *_ = levels = sorted(map(int, fusion[path]), reverse=path == "decoder")
        # cut by pooling, for the gradient of a slice would not be channels last
        *x, x_3 = ((functional.avg_pool2d(maps[path][k], 1, 2 ** (first - k)) if k < first else maps[path][k])
                   .to(member.dtype, memory_format=torch.channels_last) for k in (*levels, 3))
        convs, C_3 = [fusion[path][str(k)] for k in levels], x_3.shape[1]
        S, R = zip(*(conv.weight.flatten(1).split([x_k.shape[1], C_3], 1) for conv, x_k in zip(convs, x)))
        W = [torch.block_diag(*S), torch.cat(R), torch.cat([conv.bias for conv in convs])[:, None]]
        x = [torch.cat(x, 1)] if path == "decoder" else x
        X = [*x, functional.pad(x_3, (0, 0, 0, 0, 0, 1), value=1.0)]
        found[path] = X, torch.cat(W, 1), member[..., ::2**first, ::2**first]
    return found


def squares_and_dots(X, W, *v):
    """Return |f|^2 (1, B, h, w) and, for each v (K, D), f.v (K, B, h, w) of K vectors. X, W: of `on_grids`.

        f.v = v W X,   |f|^2 = X' W'W X = sum over k of  (A x_k + 2 up(z)) . x_k + |up(R_k x_3 + b_k)|^2

    A = S_k'S_k is the block of W'W that is x_k's alone; z = S_k'(R_k x_3 + b_k) is the block between x_k and
    [x_3 ; 1], applied to [x_3 ; 1]. Each map adds its part at its own size. In float32 |f|^2 is right to
    2e-6 of its largest value. Source: ours, equal to what `literal_features` gives."""
    *x, x_3 = X
    C, K = [x_k.shape[1] for x_k in x], sum(len(vectors) for vectors in v)
    M, M_3 = (torch.cat([W.T, *v]) @ W).split([sum(C), x_3.shape[1]], 1)
    *z, q_3, U_3 = times(M_3, x_3).split([*C, x_3.shape[1], K], 1)
    total = torch.cat([(q_3 * x_3).sum(1)[None], U_3.transpose(0, 1)])
    *bands, _, U = M.split([*C, x_3.shape[1], K])
    A = [band.narrow(1, sum(C[:k]), C[k]) for k, band in enumerate(bands)]
    for x_k, A_k, U_k, z_k in reversed([*zip(x, A, U.split(C, 1), z)]):
        total = Products.apply(x_k, A_k, U_k, z_k, total)
    return total.split([1, *map(len, v)])


class Products(torch.autograd.Function):
    """[q.x, U x] + up(s) of every pixel, q = A x + 2 up(z): (1 + K, B, h, w); A = A' (C, C), U (K, C).

    x (B, C, h, w); z (B, C, ..), s (1 + K, B, ..) are coarser. [g, d]: gradient of the result, t = g x. That
    of x: 2 g (A x + up(z)) + U'd, A: sum t x', U: sum d x', z: 2 down(t), s: down([g, d]). torch's own would
    hold 3 more maps."""

    @staticmethod
    def forward(ctx, x, A, U, z, s):
        ctx.save_for_backward(x, A, U, z)
        ctx.size = s.shape[2:]
        square = times(A, x, z, 2).mul_(x).sum(1)[None]
        dots = (U @ x.permute(0, 2, 3, 1).flatten(0, 2).T).view(-1, *square.shape[1:])
        return torch.cat([square, dots]).add_(functional.interpolate(s, x.shape[2:]))  # nearest

    @staticmethod
    def backward(ctx, gradient):
        x, A, U, z = ctx.saved_tensors
        g, d = gradient[0][:, None], gradient[1:].flatten(1)
        t, of_x = g * x, times(A, x, z).mul_(g)
        x_, t_, of_x_ = (a.permute(0, 2, 3, 1).view(-1, a.shape[1]) for a in (x, t, of_x))  # a row a pixel
        of_x_.addmm_(d.T, U, beta=2)
        return of_x, t_.T @ x_, d @ x_, 2 * down(t, z.shape[2:]), down(gradient, ctx.size)


def times(A, x, z=None, factor=1):
    """Return A x + factor up(z): (B, D, h, w); x (B, C, h, w), A (D, C), z (B, D, ..) coarser, or None."""
    if x.is_cuda:  # where a convolution rounds to TF32
        Ax = functional.linear(x.permute(0, 2, 3, 1), A).permute(0, 3, 1, 2)
    else:  # there a convolution is twice as fast
        Ax = functional.conv2d(x, A[:, :, None, None])
    if z is not None:
        blocks = Ax.unflatten(3, (z.shape[3], -1)).unflatten(2, (z.shape[2], -1))
        blocks.add_(z[:, :, :, None, :, None], alpha=factor)
    return Ax


def down(fine, size):
    """Return the sums of fine (.., h, w) over the blocks that lie on each pixel of a coarser size."""
    block = fine.shape[2] // size[0], fine.shape[3] // size[1]
    return fine if block == (1, 1) else functional.avg_pool2d(fine, block, divisor_override=1)
