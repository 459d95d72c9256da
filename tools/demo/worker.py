"""A peer of the demo: ``python -m pccl.tools.demo.worker ADDRESS NAME ...``, started by the driver.

`train` is an ordinary training loop; the rest lets a driver watch it, and strike at a moment of its choice. Each word of the driver lets
the worker go on.
"""

from __future__ import annotations

import argparse
import logging
import queue
import time

import numpy as np

import pccl
from pccl.tools.demo.data import Digits, load
from pccl.tools.demo.model import Classifier
from pccl.tools.parent import Parent


def train(comm: pccl.sync.Communicator, model: Classifier, digits: Digits, driver: Driver, options: argparse.Namespace) -> None:
    """Incumbents and newcomers run this same text; a newcomer finds out in its first `sync_state` where the others are."""
    step = 0
    while step < options.steps:
        began = time.monotonic()
        comm.update()
        state = comm.sync_state(model.state, revision=step)
        step = state.revision
        images, labels = digits.shard(step, options.batch, comm.rank, comm.world_size, seed=options.seed)
        gradients, loss = model.gradients(images, labels)
        total = np.array([loss, len(labels)], np.float32)
        driver.before_reduce(comm, step)
        work = comm.all_reduce([*gradients, total], retry=True, async_op=True)
        driver.in_reduce(comm, step)
        info: pccl.Info = work.wait()
        # Sums over images divided by their number, not averages of averages: shares may be uneven, and one is missing after a loss.
        model.learn([gradient / total[1] for gradient in gradients], step / options.steps)
        driver.tell(
            "step",
            step=step,
            loss=float(total[0] / total[1]),
            images=int(total[1]),
            rank=comm.rank,
            world=info.world_size,
            epoch=str(info.epoch),
            attempts=info.attempts,
            fetched=state.bytes_received,
            sources=state.sources,
            seconds=time.monotonic() - began,
            at=time.monotonic(),
        )
        step += 1


class Driver:
    """The process that has started this one.

    Args:
        strike: the step in whose all-reduce the driver kills a peer.
        pause: steps before whose all-reduce this worker waits for a word.
    """

    def __init__(self, strike: int, pause: list[int]) -> None:
        self._strike = strike
        self._pause = set(pause)
        self._words: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.tell = Parent(self._words.put).tell

    def wait(self) -> None:
        """Wait for a word."""
        self._words.get()

    def before_reduce(self, comm: pccl.sync.Communicator, step: int) -> None:
        """The worker is about to call."""
        if step in self._pause:
            if step == self._strike:
                comm.barrier(tag="strike")
            self.tell("paused", step=step)
            self.wait()

    def in_reduce(self, comm: pccl.sync.Communicator, step: int) -> None:
        """The worker has called. When a barrier after that has ended, the all-reduce is under way on all who do not pause."""
        if step == self._strike and step not in self._pause:
            comm.barrier(tag="strike")
            self.tell("inside", step=step)


def main() -> None:
    """Load the images, wait for the word, join, train, and say how it went."""
    parser = argparse.ArgumentParser(prog="pccl.tools.demo.worker")
    parser.add_argument("address")
    parser.add_argument("name")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--min-world-size", type=int, required=True)
    parser.add_argument("--strike", type=int, required=True)
    parser.add_argument("--pause", type=int, nargs="*", default=[])
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format=f"{options.name} %(levelname)s %(name)s: %(message)s")
    driver = Driver(options.strike, options.pause)
    digits, model, connect = load(), Classifier(options.seed), pccl.sync.connect
    driver.tell("ready")
    driver.wait()
    with connect(options.address, name=options.name, min_world_size=options.min_world_size) as comm:
        driver.tell("joined", epoch=str(comm.view.epoch), rank=comm.rank, world=comm.world_size)
        train(comm, model, digits, driver, options)
    accuracy = model.accuracy(digits.held_out_images, digits.held_out_labels)
    driver.tell("finished", digest=model.digest(), accuracy=accuracy)


if __name__ == "__main__":
    main()
