"""The control channel over ZeroMQ: ROUTER at the master, DEALER at each peer."""

from pccl.transports.zmq_client import ZmqClient
from pccl.transports.zmq_server import ZmqServer

__all__ = ["ZmqClient", "ZmqServer"]
