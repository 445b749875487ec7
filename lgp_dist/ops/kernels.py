"""Triton kernels of `stitch_norm` and `norm_residual`. Rows are tokens; statistics are float32, of rounded rows.

Shapes: X [M, K], W [N, K], B, G, BETA [N], Y, Z, DY, DZ, DT [M, N], MEAN, RSTD [M], SUMS [2, P, N]; all contiguous.
DeiT's widths are 3 * 2^k and tiles are 2^k, so a row of X is one or three chunks, and the columns of W are a loop.
"""

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run on the CPU in Triton's interpreter; Triton decides that at import."""

_UP = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(a, b, acc):
    if _UP:  # the interpreter multiplies the raw bits of bf16 (triton#11584)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """float32 rounded to a dtype, ties to even. The interpreter truncates to bf16, so half a unit is added first."""
    if _UP and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def stitch_norm_forward(
    X, W, B, Y, Z, MEAN, RSTD, M, eps,
    K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Y = X W^T + B and Z = (Y - mean) rstd. K is BK or 3 BK; N a multiple of BN.

    A program has BM rows. X stays on chip; the loop over columns writes Y and merges (mean, M2) by Chan's rule; a
    second loop reads Y back from L2 and writes Z.
    """
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.arange(0, BN)
    rk = tl.arange(0, BK)
    inside = rm < M
    mask = inside[:, None]
    xp = X + rm.to(tl.int64)[:, None] * K + rk[None, :]
    x0 = tl.load(xp, mask=mask, other=0.0)
    if K > BK:
        x1 = tl.load(xp + BK, mask=mask, other=0.0)
        x2 = tl.load(xp + 2 * BK, mask=mask, other=0.0)
    mean = tl.zeros([BM], tl.float32)
    m2 = tl.zeros([BM], tl.float32)
    yp = Y + rm.to(tl.int64)[:, None] * N + rn[None, :]
    for n in range(0, N, BN):
        wp = W + (n + rn)[None, :] * K + rk[:, None]
        acc = _dot(x0, tl.load(wp), tl.zeros([BM, BN], tl.float32))
        if K > BK:
            acc = _dot(x1, tl.load(wp + BK), acc)
            acc = _dot(x2, tl.load(wp + 2 * BK), acc)
        y = _rounded(acc + tl.load(B + n + rn).to(tl.float32)[None, :], Y.dtype.element_ty)
        tl.store(yp + n, y, mask=mask)
        f = y.to(tl.float32)
        chunk = tl.sum(f, 1) * (1.0 / BN)
        f = f - chunk[:, None]
        step = chunk - mean
        share = BN / ((n + BN) * 1.0)
        mean = mean + step * share
        m2 = m2 + tl.sum(f * f, 1) + step * step * (n * share)
    rstd = 1.0 / tl.sqrt(m2 * (1.0 / N) + eps)
    tl.store(MEAN + rm, mean, mask=inside)
    tl.store(RSTD + rm, rstd, mask=inside)
    tl.debug_barrier()  # Y was written by other threads of this program
    zp = Z + rm.to(tl.int64)[:, None] * N + rn[None, :]
    for n in range(0, N, BN):
        f = (tl.load(yp + n, mask=mask, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        tl.store(zp + n, _rounded(f, Z.dtype.element_ty), mask=mask)


@triton.jit
def norm_residual_forward(
    BRANCH, RESIDUAL, G, BETA, Y, Z, MEAN, RSTD, M, eps,
    N: tl.constexpr, NP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Y = RESIDUAL + BRANCH and Z = (Y - mean) rstd G + BETA. NP is the least power of 2 that is N or more."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.arange(0, NP)
    inside, columns = rm < M, rn < N
    mask = inside[:, None] & columns[None, :]
    at = rm.to(tl.int64)[:, None] * N + rn[None, :]
    f = tl.load(BRANCH + at, mask=mask, other=0.0).to(tl.float32)
    f += tl.load(RESIDUAL + at, mask=mask, other=0.0).to(tl.float32)
    y = _rounded(f, Y.dtype.element_ty)
    tl.store(Y + at, y, mask=mask)
    f = y.to(tl.float32)
    mean = tl.sum(f, 1) * (1.0 / N)
    f = tl.where(mask, f - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(f * f, 1) * (1.0 / N) + eps)
    tl.store(MEAN + rm, mean, mask=inside)
    tl.store(RSTD + rm, rstd, mask=inside)
    f = f * rstd[:, None] * tl.load(G + rn, mask=columns, other=0.0).to(tl.float32)[None, :]
    f += tl.load(BETA + rn, mask=columns, other=0.0).to(tl.float32)[None, :]
    tl.store(Z + at, _rounded(f, Z.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward(
    DY, DZ, Y, G, MEAN, RSTD, DT, SUMS, M, P,
    N: tl.constexpr, NP: tl.constexpr, BM: tl.constexpr, HAS_DY: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """DT = DY + (gradient of the norm at Y) in one pass, and sums of the gradients of gamma and beta.

    Program p has the tiles p, p + P, ... and writes its sums into SUMS [2, P, N] float32; they are zero without AFFINE.
    """
    p = tl.program_id(0)
    rn = tl.arange(0, NP)
    columns = rn < N
    sum_g = tl.zeros([NP], tl.float32)
    sum_b = tl.zeros([NP], tl.float32)
    if AFFINE:
        g = tl.load(G + rn, mask=columns, other=0.0).to(tl.float32)
    for tile in range(p, tl.cdiv(M, BM), P):
        rm = tile * BM + tl.arange(0, BM)
        inside = rm < M
        mask = inside[:, None] & columns[None, :]
        at = rm.to(tl.int64)[:, None] * N + rn[None, :]
        dz = tl.load(DZ + at, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(Y + at, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(MEAN + rm, mask=inside, other=0.0)
        rstd = tl.load(RSTD + rm, mask=inside, other=0.0)
        x = tl.where(mask, (y - mean[:, None]) * rstd[:, None], 0.0)
        if AFFINE:
            sum_b += tl.sum(dz, 0)
            sum_g += tl.sum(dz * x, 0)
            dz = dz * g[None, :]
        along = tl.sum(dz * x, 1) * (1.0 / N)
        level = tl.sum(dz, 1) * (1.0 / N)
        dt = (dz - x * along[:, None] - level[:, None]) * rstd[:, None]
        if HAS_DY:
            dt += tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(DT + at, _rounded(dt, DT.dtype.element_ty), mask=mask)
    at = p * N + rn
    tl.store(SUMS + at, sum_g, mask=columns)
    tl.store(SUMS + P * N + at, sum_b, mask=columns)
