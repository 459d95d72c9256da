"""`pccl stress`: real processes on this machine, faults at random, every result checked.

`plan` draws the faults from a seed, `driver` plays them, each `worker` runs a training loop (`program` says what its calls are and what
they have to give, `calls` makes and checks them), and `judge` compares what the workers say with one another.
"""
