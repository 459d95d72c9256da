"""Train a small network on as many machines as there are, and go on when some of them die.

On one machine:         pccl master --listen 0.0.0.0:48148 --key master.key
On every machine:       python train_two_machines.py 'pccl://first-machine:48148?key=...'
or, with PCCL_MASTER:   python train_two_machines.py

Start it as often as you like, kill it where you like, start it again: the others go on, and newcomers take over their state.
Only numpy and pccl are needed.
"""

import argparse
import hashlib
import logging
import os

import numpy as np

import pccl

BATCH = 512
RATE = 0.05


def make_parameters() -> dict[str, np.ndarray]:
    """The same on every machine; newcomers get the present ones from the others."""
    rng = np.random.default_rng(0)
    return {
        "w1": rng.normal(0, 1.0, (2, 64)).astype(np.float32),
        "b1": np.zeros(64, np.float32),
        "w2": rng.normal(0, 0.2, (64, 1)).astype(np.float32),
        "b2": np.zeros(1, np.float32),
    }


def make_shard(step: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """This machine's share of a step's batch: points in a square, and the function that the network has to learn."""
    points = np.random.default_rng(step).uniform(-2, 2, (BATCH, 2)).astype(np.float32)[rank::world_size]
    return points, np.sin(points[:, :1] * 2) * points[:, 1:]


def gradients(p: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
    """Gradients and squared error, summed over the shard."""
    hidden = np.tanh(x @ p["w1"] + p["b1"])
    error = hidden @ p["w2"] + p["b2"] - y
    back = error @ p["w2"].T * (1 - hidden**2)
    return {"w1": x.T @ back, "b1": back.sum(0), "w2": hidden.T @ error, "b2": error.sum(0)}, float((error**2).sum())


def train(comm: pccl.sync.Communicator, parameters: dict[str, np.ndarray], steps: int) -> None:
    """The loop. Incumbents and newcomers run the same text."""
    step = 0
    while step < steps:
        comm.update()  # newcomers enter here, and nowhere else
        step = comm.sync_state(parameters, revision=step).revision  # moves data only if somebody lacks some
        points, values = make_shard(step, comm.rank, comm.world_size)
        found, loss = gradients(parameters, points, values)
        total = np.array([loss, len(points)], np.float32)
        info = comm.all_reduce([*found.values(), total], retry=True)  # if somebody dies now, the others do it again
        for name, gradient in found.items():
            parameters[name] -= RATE * gradient / total[1]
        if step % 100 == 0 or info.attempts > 1:
            again = f", in {info.attempts} attempts" if info.attempts > 1 else ""
            print(f"step {step}: loss {total[0] / total[1]:.4f}, {info.world_size} peers, epoch {info.epoch}{again}", flush=True)
        step += 1


def main() -> None:
    """Read the command line, join, train, and print a fingerprint of the result: it is the same everywhere."""
    parser = argparse.ArgumentParser(description="Train a small network on several machines.")
    parser.add_argument("master", nargs="?", default=os.environ.get("PCCL_MASTER"), help="the master's address (default: PCCL_MASTER)")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--min-peers", type=int, default=1, help="begin when there are so many, and give up when there are fewer")
    parser.add_argument("--key", help="this machine's key file, if the master has an allow-list")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")  # who is lost, and whom a call waits for
    if not options.master:
        parser.error("the address of a master is needed, as an argument or in PCCL_MASTER")
    parameters = make_parameters()
    settings = {"key": options.key} if options.key else {}
    with pccl.sync.connect(options.master, min_world_size=options.min_peers, **settings) as comm:
        print(f"joined as rank {comm.rank} of {comm.world_size}", flush=True)
        train(comm, parameters, options.steps)
    print("parameters:", hashlib.sha256(b"".join(p.tobytes() for p in parameters.values())).hexdigest()[:16])


if __name__ == "__main__":
    main()
