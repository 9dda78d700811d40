"""The Triton kernels on a CPU, by Triton's interpreter, against plain torch: run by tests/test_kernels.py.

Triton must be told before it is imported, so this is a process of its own.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.nn.functional import normalize, softplus

from curate import kernels


def rows(n: int, D: int, seed: int) -> torch.Tensor:
    """Unit rows in float16: the interpreter multiplies bfloat16 as if it were integers."""
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, D, generator=generator), dim=1).half()


def check_logits() -> None:
    for B, c, D in ((1, 1, 8), (130, 5, 64), (257, 300, 48), (40, 128, 72)):
        z, columns = rows(B, D, 1), rows(c, D, 2)
        for scale, bias in ((40.0, -12.0), (117.0, 3.0)):
            logits = scale * (z.double() @ columns.double().T) + bias
            found = kernels.reduce_logits(z, columns, scale, bias, softplus=True)
            torch.testing.assert_close(found.double(), softplus(logits, threshold=50).sum(1), rtol=1e-4, atol=1e-4)
            found = kernels.reduce_logits(z, columns, scale, bias, softplus=False)
            torch.testing.assert_close(found.double(), logits.logsumexp(1), rtol=1e-4, atol=1e-4)
    # Far below 0 softplus is exp, and float32 must not round it away; far above it is x.
    one = torch.ones(1, 1, dtype=torch.float16)
    for bias in (-40.0, -12.0, -5.0, 0.0, 5.0, 30.0, 100.0):
        found = kernels.reduce_logits(one, one, 1.0, bias - 1, softplus=True)
        expected = softplus(torch.tensor([bias], dtype=torch.float64), threshold=50)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert len(kernels.reduce_logits(one[:0], one, 1.0, 0.0, softplus=True)) == 0


def check_near() -> None:
    for n, D in ((1, 8), (150, 64), (300, 40)):
        z = rows(n, D, 3)
        z[n // 2 :] = z[: n - n // 2]
        generator = torch.Generator().manual_seed(n)
        for share in (0.0, 0.3, 1.0):
            fresh = torch.rand(n, generator=generator) < share
            for top, bottom, left, right in ((0, n, 0, n), (0, n // 3, 0, n), (n // 4, n // 2, n // 3, n)):
                if bottom <= top or right <= left:
                    continue
                found, count = kernels.near_tiles(z, 0.3, top, bottom, left, right, fresh=fresh, capacity=n * n)
                product = z.float() @ z.float().T
                expected = {
                    (i, j)
                    for i, j in ((product >= 0.3) & (fresh[:, None] | fresh)).nonzero().tolist()
                    if i < j and top <= i < bottom and left <= j < right
                }
                pairs = [divmod(pair, 2**32) for pair in found[: int(count)].tolist()]
                assert len(pairs) == len(set(pairs))
                assert set(pairs) == expected, (n, D, share, top)
                few = kernels.near_tiles(z, 0.3, top, bottom, left, right, fresh=fresh, capacity=2)
                assert int(few[1]) == len(expected)
                assert {divmod(pair, 2**32) for pair in few[0][: min(2, len(expected))].tolist()} <= expected


if __name__ == "__main__":
    check_logits()
    check_near()
