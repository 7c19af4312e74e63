"""A second process that takes images of a batch off the main one's hands (phase b)."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.multiprocessing as mp
from torch import Tensor

TIMEOUT = 120  # seconds; a helper that died is noticed and the run ends with an error


class Team:
    """Runs `work(index, seed, leaf) -> figures` for every image of a batch.

    Image embeddings and their gradients lie in shared memory. Each process takes the next image
    until none is left, so a helper slowed down by other programs only takes fewer.

    Parameters
    ----------
    work : callable
        Takes (scene index, leaf Tensor [n_patch, width] that requires a gradient), returns figures;
        runs backward itself.
    n_helpers : int
        Extra processes; 0 does everything here.
    shape : tuple of int
        [batch, n_patch, width].
    """

    def __init__(
        self, work: Callable[[int, Tensor], dict], n_helpers: int, shape: tuple[int, int, int]
    ) -> None:
        self.work, self.batch = work, shape[0]
        self.values = torch.zeros(shape).share_memory_()
        self.grads = torch.zeros(shape).share_memory_()
        self.scenes = torch.zeros(shape[0], dtype=torch.long).share_memory_()
        context = mp.get_context("fork")  # shares the language model's weights
        self.next = context.Value("i", 0)
        self.go = context.Semaphore(0)
        self.done = context.Queue()
        self.helpers = [context.Process(target=self._serve, daemon=True) for _ in range(n_helpers)]
        for helper in self.helpers:
            helper.start()

    def run(self, values: Tensor, scenes: list[int]) -> tuple[Tensor, list[dict]]:
        """Gradients of a batch, [batch, n_patch, width], and the figures of every image."""
        self.values.copy_(values)
        self.scenes.copy_(torch.tensor(scenes))
        self.next.value = 0
        for _ in self.helpers:
            self.go.release()
        figures = self._take(self.batch)
        for _ in self.helpers:
            figures += self.done.get(timeout=TIMEOUT)
        return self.grads.clone(), figures

    def _take(self, end: int) -> list[dict]:
        figures = []
        while True:
            with self.next.get_lock():
                i = self.next.value
                if i >= end:
                    return figures
                self.next.value += 1
            leaf = self.values[i].clone().requires_grad_()
            figures.append(self.work(int(self.scenes[i]), leaf))
            self.grads[i] = leaf.grad

    def _serve(self) -> None:
        torch.set_num_threads(1)
        end = self.batch
        while True:
            self.go.acquire()
            cpu, wall = time.process_time(), time.monotonic()
            self.done.put(self._take(end))
            # A helper short of processor time leaves the last image, or everyone waits for it.
            cpu, wall = time.process_time() - cpu, time.monotonic() - wall
            end = self.batch if cpu > 0.8 * wall else self.batch - 1
