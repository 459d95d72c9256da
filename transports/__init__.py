"""Layer 1: links between peers and the control channel to the master. Import as `pccl.transports`."""

if not __name__.startswith("pccl."):
    raise ImportError("import pccl.transports; under its bare name this folder would be a second copy of the same classes")
