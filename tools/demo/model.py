"""A small classifier in numpy: two hidden layers, softmax, stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import xxhash

from pccl.tools.demo.data import PIXELS, Images, Labels

Tensor = npt.NDArray[np.float32]

LAYERS = (PIXELS, 256, 128, 10)
RATE = 0.2
MOMENTUM = 0.9


class Classifier:
    """Parameters, their momenta, and what a training loop does with them. The same bits in, the same bits out."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.parameters: list[Tensor] = []
        """Weights and bias of each layer in turn"""
        for inputs, outputs in pairwise(LAYERS):
            self.parameters.append(rng.standard_normal((inputs, outputs), np.float32) * np.float32((2 / inputs) ** 0.5))
            self.parameters.append(np.zeros(outputs, np.float32))
        self.momenta = [np.zeros_like(p) for p in self.parameters]

    @property
    def state(self) -> dict[str, Tensor]:
        """All that a newcomer needs, by name."""
        named = {"parameter": self.parameters, "momentum": self.momenta}
        return {f"{kind} {i}": tensor for kind, tensors in named.items() for i, tensor in enumerate(tensors)}

    def gradients(self, images: Images, labels: Labels) -> tuple[list[Tensor], float]:
        """Gradients and loss, summed (not averaged) over the images."""
        layers = self._forward(images)
        scores = layers[-1] - layers[-1].max(axis=1, keepdims=True)
        chances = np.exp(scores)
        chances /= chances.sum(axis=1, keepdims=True)
        right = np.arange(len(labels)), labels
        loss = -np.log(np.maximum(chances[right], 1e-30)).sum()
        error = chances
        error[right] -= 1
        found: list[Tensor] = []
        for i in reversed(range(0, len(self.parameters), 2)):
            before = layers[i // 2]
            found += [error.sum(axis=0), before.T @ error]
            error = (error @ self.parameters[i].T) * (before > 0)
        return found[::-1], float(loss)

    def learn(self, gradients: Sequence[Tensor], progress: float) -> None:
        """Take a step along averaged gradients; the rate falls to zero over the second half of the run."""
        rate = np.float32(RATE * min(1.0, 2 * (1 - progress)))
        for parameter, momentum, gradient in zip(self.parameters, self.momenta, gradients, strict=True):
            momentum *= np.float32(MOMENTUM)
            momentum += gradient
            parameter -= rate * momentum

    def accuracy(self, images: Images, labels: Labels) -> float:
        """Which part of the images it reads as their labels say."""
        return float((self._forward(images)[-1].argmax(axis=1) == labels).mean())

    def digest(self) -> str:
        """xxh3-128 of all parameters."""
        digest = xxhash.xxh3_128()
        for parameter in self.parameters:
            digest.update(np.ascontiguousarray(parameter).data)
        return digest.hexdigest()

    def _forward(self, images: Images) -> list[Tensor]:
        """The input and what each layer makes of it."""
        layers = [images]
        last = len(self.parameters) - 2
        for i in range(0, len(self.parameters), 2):
            out = layers[-1] @ self.parameters[i] + self.parameters[i + 1]
            layers.append(out if i == last else np.maximum(out, 0))
        return layers
