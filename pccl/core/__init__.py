"""Layer 0: errors, types, options, the wire format, frames and schedule data. Imports nothing of pccl above it."""
