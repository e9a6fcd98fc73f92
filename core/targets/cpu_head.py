"""The most probable token without reading all of the head.

A copy of the head in int8, one scale per row, gives every logit to within a bound: |e_r . x| <= |e_r| |x| for the row's error
e_r. Rows whose upper bound stays below another row's lower bound cannot win; the few that are left are computed from the head
itself. The result is that of all logits, for a quarter (float32) or half (16 bits) of the bytes.
"""

from __future__ import annotations

import torch

from ...kernels import cpu_step
from ...kernels.cpu_step import Instruction, Op

_ROWS = 256
"""Rows that are converted at a time, so that a wide copy of the head never exists."""


class Screen:
    """head: [vocab_size, hidden], any float type."""

    def __init__(self, head: torch.Tensor) -> None:
        vocab, width = head.shape
        self._rows = torch.empty(vocab, width, dtype=torch.int8)
        self._scale, self._error = torch.empty(vocab), torch.empty(vocab)
        for begin in range(0, vocab, _ROWS):
            part = slice(begin, min(begin + _ROWS, vocab))
            wide = head[part].float()
            scale = wide.abs().amax(1).div_(127.0).clamp_(min=torch.finfo(torch.float32).tiny)
            rows = torch.div(wide, scale[:, None]).round_()
            error = torch.addcmul(wide, rows, scale[:, None], value=-1.0).norm(dim=1)
            # Sums in float32 differ from exact ones by a few units for each of the width / 16 terms of a lane, and the
            # hidden state is rounded to steps of its largest value / limit: by half a step in each column.
            limit = min(32767.0, (2.0**31 - 1) / (127 * (width // 16 + 2)) - 1)
            rounding = ((width / 16 + 32) * 2.0**-23 + 0.51 * width**0.5 / limit) * (wide.norm(dim=1) + error)
            self._rows[part], self._scale[part], self._error[part] = rows, scale, error + rounding

    def instructions(self, head: Instruction) -> list[Instruction]:
        """What replaces the instruction of the head, and leaves tokens instead of logits."""
        same = {"n": head.n, "k": head.k, "ldx": head.ldx, "x": head.x, "y": head.y}
        error = self._error.data_ptr()
        return [
            Instruction(
                op=Op.LINEAR, wtype=cpu_step.WEIGHT_TYPES["int8"], w=self._rows.data_ptr(),
                scale=self._scale.data_ptr(), bias=head.bias, **same,
            ),
            Instruction(op=Op.SCREEN, bias=error, **same),
            Instruction(
                op=Op.RESCORE, wtype=head.wtype, w=head.w, bias=error, residual=head.bias, scale=head.scale, **same
            ),
            Instruction(op=Op.PICK, **same),
        ]  # fmt: skip
