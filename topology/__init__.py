"""Layer 2: trees and orders over the peers, and what links between them exist. Import as `pccl.topology`."""

if not __name__.startswith("pccl."):
    raise ImportError("import pccl.topology; under its bare name this folder would be a second copy of the same classes")
