"""The portable kernel in torch operations: any device, slower than the specialised kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lark_store.gradients.sketch.oporp import Oporp

Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 26, "mps": 1 << 24}  # coordinates at a time: a CPU's cache, a GPU's width

_MAX_RUNS = 1 << 25  # runs with cached codes, 470 MB


class PlainKernel:
    """A `Kernel` that caches inverted codes on the device, 14 bytes per 64 coordinates."""

    def __init__(self, oporp: Oporp, device: torch.device) -> None:
        self.oporp, self.device = oporp, device
        self._codes: dict[tuple[int, int], Codes] = {}
        self._n_runs = 0
        lanes = torch.arange(64)
        self._lane_table = (lanes[:, None] ^ lanes[None, :]).to(device)
        byte = torch.arange(256)[:, None]
        self._sign_table = (1 - 2 * ((byte >> torch.arange(8)) & 1)).to(device, torch.float32)

    def new(self, n: int) -> torch.Tensor:
        """Return `n` empty sketches, (S, K)."""
        return torch.zeros(n, self.oporp.k, device=self.device)

    def add(self, gradient_SN: torch.Tensor, first_chunk: int, out: torch.Tensor) -> None:
        """Add stretches that start at chunk `first_chunk`."""
        n_runs = -(-gradient_SN.shape[1] // 64)
        padding = (0, (n_runs + 1) * 64 - gradient_SN.shape[1])  # plus a run of zeros, for bins without a source
        runs = torch.nn.functional.pad(gradient_SN.detach().float(), padding).view(len(out), -1, 64)
        for source, lane, sign in self._blocks(first_chunk, n_runs):
            signs = self._sign_table.index_select(0, sign).view(-1, 64)
            order = self._lane_table.index_select(0, lane)
            for s, values in enumerate(runs):
                moved = values.index_select(0, source).gather(1, order)
                out[s] += moved.mul_(signs).view(-1, self.oporp.k).sum(dim=0)

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """Return the sketches unchanged."""
        return out

    def _blocks(self, first_chunk: int, n_runs: int) -> Iterator[Codes]:
        key = (first_chunk, n_runs)
        if key not in self._codes:
            self._n_runs += n_runs
            if self._n_runs > _MAX_RUNS:
                self._codes, self._n_runs = {}, n_runs
            self._codes[key] = self._gather_codes(first_chunk, n_runs)
        source, lane, sign = self._codes[key]
        step = max(1, _BLOCK[self.device.type] // self.oporp.k) * self.oporp.rows
        for start in range(0, source.numel(), step):
            block = slice(start, start + step)
            yield source[block], lane[block].int(), sign[block].flatten().int()

    def _gather_codes(self, first_chunk: int, n_runs: int) -> Codes:
        """Return each bin row's source run, lane code and sign bytes, for every chunk."""
        rows, lanes, signs = self.oporp.codes(first_chunk, -(-n_runs // self.oporp.rows))
        run = torch.arange(rows.numel()).view_as(rows)
        run = torch.where(run < n_runs, run, n_runs)
        source = torch.empty_like(rows).scatter_(1, rows, run)
        lane = torch.empty_like(rows).scatter_(1, rows, lanes)
        sign = torch.empty_like(signs).scatter_(1, rows[..., None].expand_as(signs), signs)
        signs_u8 = torch.stack([(sign >> (8 * i)) & 0xFF for i in range(4)], dim=-1).to(torch.uint8)
        codes = source.flatten().int(), lane.flatten().to(torch.uint8), signs_u8.view(-1, 8)
        return codes[0].to(self.device), codes[1].to(self.device), codes[2].to(self.device)
