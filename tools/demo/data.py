"""The 10,000 images that the package carries: 8,000 to train on, 2,000 held out."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib import resources

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.float32]
"""One image per row, from 0 to 1."""
Labels = npt.NDArray[np.uint8]

TRAINING = 8_000
SIDE = 28
PIXELS = SIDE * SIDE


@dataclass(frozen=True, slots=True)
class Digits:
    """Images of handwritten digits, and what they show."""

    images: Images
    labels: Labels
    held_out_images: Images
    held_out_labels: Labels

    def shard(self, step: int, batch: int, rank: int, world_size: int, *, seed: int) -> tuple[Images, Labels]:
        """A peer's share of a step's batch: the members' shares are disjoint, and together they are the batch.

        The order of the images is another one in each epoch, and each step shifts its images by up to a pixel, so that none is seen too
        often. All of that depends on nothing but seed and step: it is the same on every peer, whoever joined when.
        """
        per_epoch = len(self.images) // batch
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(self.images))
        mine = order[place * batch : (place + 1) * batch][rank::world_size]
        down, right = np.random.default_rng((seed, epoch, place)).integers(-1, 2, size=2)
        shifted = np.roll(self.images[mine].reshape(-1, SIDE, SIDE), (down, right), axis=(1, 2))
        return shifted.reshape(-1, PIXELS), self.labels[mine]


def load() -> Digits:
    """Read the images (28 x 28 pixels)."""
    images = _read("t10k-images-idx3-ubyte.gz", header=16).reshape(-1, PIXELS).astype(np.float32) / np.float32(255)
    labels = _read("t10k-labels-idx1-ubyte.gz", header=8)
    return Digits(images[:TRAINING], labels[:TRAINING], images[TRAINING:], labels[TRAINING:])


def _read(name: str, *, header: int) -> npt.NDArray[np.uint8]:
    packed = resources.files("pccl.tools").joinpath("data", "mnist", name).read_bytes()
    return np.frombuffer(gzip.decompress(packed), np.uint8, offset=header)
